"""Where checkpoints are written."""

from tests.integrations.lightning.toys import Classifier, differing, loader, lora, trainer, values


def test_a_file_system_that_only_fsspec_knows_has_a_whole_file(tmp_path):
    module, fresh = Classifier(), Classifier()
    run = trainer(tmp_path, [lora()], max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint("memory://it.ckpt")
    trainer(tmp_path, [lora()]).validate(fresh, loader(), ckpt_path="memory://it.ckpt")
    assert not differing(values(fresh), values(module))
