"""Where checkpoints are written, and what is left of loading them."""

import pytest

from tests.integrations.lightning.toys import Classifier, differing, loader, lora, trainer, values


def test_a_file_system_that_only_fsspec_knows_has_a_whole_file(tmp_path):
    module, fresh = Classifier(), Classifier()
    run = trainer(tmp_path, [lora()], max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint("memory://it.ckpt")
    trainer(tmp_path, [lora()]).validate(fresh, loader(), ckpt_path="memory://it.ckpt")
    assert not differing(values(fresh), values(module))


class Refuses(Classifier):
    """Refuses each file."""

    def on_load_checkpoint(self, checkpoint):
        raise ValueError("not this one")


def test_a_hook_that_refuses_a_file_is_the_modules_own_again(tmp_path):
    run, module = trainer(tmp_path, [lora()], max_epochs=1), Refuses()
    run.fit(Refuses(), loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    with pytest.raises(ValueError, match="not this one"):
        trainer(tmp_path, [lora()]).test(module, loader(), ckpt_path=tmp_path / "it.ckpt")
    assert "on_load_checkpoint" not in vars(module)
