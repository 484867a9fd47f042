"""Compiled modules, whole or in part: trained as eager ones are, and no trace of the compiler in files.

Nor of what checkpointing of activations inserts.
"""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.functional import cross_entropy

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint
from lora_plugins.utils import plain_name
from tests.integrations.lightning.toys import Classifier, differing, load, loader, lora, trainer, values

WRAPPED = pytest.mark.parametrize(
    "wrapped",
    [lambda part: torch.compile(part, backend="eager"), checkpoint_wrapper],
    ids=["compiled", "checkpointed"],
)


def plain_values(module):
    return {plain_name(key): tensor for key, tensor in values(module).items()}


class Quiet(Classifier):
    """Without self.log, which lightning 2.6.6 cannot trace under torch 2.13."""

    def _step(self, batch, stage):
        return cross_entropy(self(batch[0]), batch[1])


class CountGraphs(Callback):
    def __init__(self):
        self.counts = []

    def on_train_batch_end(self, *_):
        self.counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class TestCompile:
    def test_of_the_module_leaves_no_trace_in_files(self, tmp_path):
        torch.manual_seed(1)
        eager = Quiet()
        trainer(tmp_path, [lora()]).fit(eager, loader())
        torch.manual_seed(1)
        module = Quiet()
        run = trainer(tmp_path, [lora()])
        run.fit(torch.compile(module, backend="eager"), loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        assert not [key for key in load(tmp_path / "it.ckpt")["state_dict"] if "_orig_mod" in key]
        again = load_from_checkpoint(Quiet, tmp_path / "it.ckpt")
        assert not differing(values(again), values(module))
        torch.testing.assert_close(values(eager), values(module))  # traced, the law is written out: other sums

    @pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # inductor's own
    @pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_compiles_once_and_trains_as_eager_does(self, tmp_path, backend):
        modules = []
        for compiled in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            torch.manual_seed(1)
            module, graphs = Quiet(), CountGraphs()
            run = trainer(tmp_path, [lora(), graphs])
            run.fit(torch.compile(module, backend=backend) if compiled else module, loader())
            assert (len(set(graphs.counts[2:])), graphs.counts[-1] > 0) == (1, compiled)
            run.save_checkpoint(tmp_path / f"{compiled}.ckpt")
            modules.append(module)
        torch.testing.assert_close(values(modules[1]), values(modules[0]), rtol=1e-4, atol=1e-5)  # fused sums
        eager, compiled = (load(tmp_path / f"{compiled}.ckpt") for compiled in (False, True))
        assert eager["state_dict"].keys() == compiled["state_dict"].keys()

    @WRAPPED
    def test_adapter_folder_of_a_compiled_part_has_plain_names(self, tmp_path, wrapped):
        module = Classifier()
        module.net = wrapped(module.net)
        folder = str(tmp_path / "adapter")
        config = LoraConfig(r=2, target_modules=["0", "3"])
        trainer(tmp_path, [lora(config, save_adapter_to=folder)]).fit(module, loader())
        again = Classifier()
        LoraModel.load_adapter(again, folder)
        assert not differing(plain_values(module), values(again))

    @WRAPPED
    def test_of_a_part_adapts_and_resumes(self, tmp_path, wrapped):
        def compiled():
            module = Classifier()
            module.net = wrapped(module.net)
            return module

        config = LoraConfig(r=2, target_modules=["0", "3"])
        run = trainer(tmp_path, [lora(config)])
        module = compiled()
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        again = compiled()
        trainer(tmp_path, [lora(config)], max_epochs=3).fit(again, loader(), ckpt_path=tmp_path / "it.ckpt")
        assert all(p.abs().sum() > 0 for name, p in again.named_parameters() if ".lora_B." in name)

    @WRAPPED
    @pytest.mark.parametrize("where", ["__init__", "setup", "configure_model", "on_train_start"])
    def test_a_part_that_the_class_compiles_is_loaded_without_a_trainer(self, tmp_path, where, wrapped):
        class Compiles(Classifier):
            def compile_it(self):
                if isinstance(self.net, nn.Sequential):
                    self.net = wrapped(self.net)

        def hook(self, *_, **__):
            if where == "__init__":
                Classifier.__init__(self)
            self.compile_it()

        setattr(Compiles, where, hook)
        module = Compiles()
        run = trainer(tmp_path, [lora(LoraConfig(r=2, target_modules="all", modules_to_save=["3"]))])
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        again = load_from_checkpoint(Compiles, tmp_path / "it.ckpt")
        assert not differing(plain_values(module), plain_values(again))

    @pytest.mark.parametrize("compiled", [True, False], ids=["of_the_compiled", "of_the_eager"])
    def test_a_class_that_names_a_compiled_part_in_its_files_reads_them(self, tmp_path, compiled):
        class NamesItsFiles(Classifier):
            """Writes the names of the eager module, and puts those of the compiled one back."""

            def __init__(self, compiled=True):
                super().__init__()
                if compiled:
                    self.net = torch.compile(self.net, backend="eager")
                self.compiled = compiled

            def on_save_checkpoint(self, checkpoint):
                state = checkpoint["state_dict"]
                checkpoint["state_dict"] = {key.replace("net._orig_mod.", "net."): state[key] for key in state}

            def on_load_checkpoint(self, checkpoint):
                if self.compiled:
                    state = checkpoint["state_dict"]
                    checkpoint["state_dict"] = {key.replace("net.", "net._orig_mod."): state[key] for key in state}
                assert checkpoint["state_dict"].keys() == self.state_dict().keys()

        module = NamesItsFiles(compiled)
        run = trainer(tmp_path, [lora(LoraConfig(r=2, target_modules=["0", "3"], norm="track"))])
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        again = NamesItsFiles()
        trainer(tmp_path, [lora()]).validate(again, loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False)
        for loaded in (again, load_from_checkpoint(NamesItsFiles, tmp_path / "it.ckpt")):
            assert not differing(plain_values(module), plain_values(loaded))

    def test_a_file_that_does_not_say_which_names_were_written_is_read_by_those_of_the_module(self, tmp_path):
        class ReadsItsCompiledPart(Classifier):
            def __init__(self):
                super().__init__()
                self.net = torch.compile(self.net, backend="eager")

            def on_load_checkpoint(self, checkpoint):
                assert checkpoint["state_dict"].keys() == self.state_dict().keys()

        module = ReadsItsCompiledPart()
        run = trainer(tmp_path, [lora()])
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        checkpoint = torch.load(tmp_path / "it.ckpt", weights_only=False)
        del checkpoint["lora_plugins"]["compiled"]  # as of files that are older than the entry
        torch.save(checkpoint, tmp_path / "it.ckpt")
        again = load_from_checkpoint(ReadsItsCompiledPart, tmp_path / "it.ckpt")
        assert not differing(plain_values(module), plain_values(again))

    @WRAPPED
    @pytest.mark.parametrize("where", ["__init__", "configure_model"])
    def test_a_part_that_is_kept_beside_its_compiled_self_is_loaded(self, tmp_path, where, wrapped):
        class KeepsBoth(Quiet):
            def forward(self, x):
                return self.fast(x)

        def hook(self):
            if where == "__init__":
                Quiet.__init__(self)
            if not hasattr(self, "fast"):
                self.fast = wrapped(self.net)

        setattr(KeepsBoth, where, hook)
        module = KeepsBoth()
        run = trainer(tmp_path, [lora()])
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        assert not differing(values(module), values(load_from_checkpoint(KeepsBoth, tmp_path / "it.ckpt")))
        again = KeepsBoth()
        trainer(tmp_path, [lora()]).validate(again, loader(), ckpt_path=tmp_path / "it.ckpt")
        assert not differing(values(module), values(again))

    @WRAPPED
    @pytest.mark.parametrize("merge", [False, True], ids=["unmerged", "merged"])
    def test_target_inside_of_a_compiled_part(self, tmp_path, wrapped, merge):
        """The name of a target passes over what is inserted, and a merged module is the same without it."""
        modules = []
        for wrap in (False, True):
            torch.manual_seed(1)
            module = Classifier()
            module.net = nn.Sequential(module.net)
            if wrap:
                module.net = wrapped(module.net)
            callback = LoraCallback(LoraConfig(r=2, target_modules=["0", "3"]), target="net.0", merge_on_fit_end=merge)
            run = trainer(tmp_path, [callback])
            run.fit(module, loader())
            run.validate(module, loader(), verbose=False)
            run.fit_loop.max_epochs += 1
            run.fit(module, loader())
            modules.append(module)
        torch.testing.assert_close(*map(plain_values, modules))

    @WRAPPED
    def test_file_of_a_compiled_part_loads_into_the_eager_module_and_back(self, tmp_path, wrapped):
        config = LoraConfig(r=2, target_modules=["0", "3"])
        for first, second in ((True, False), (False, True)):
            modules = []
            for compile_it in (first, second):
                module = Classifier()
                if compile_it:
                    module.net = wrapped(module.net)
                modules.append(module)
            run = trainer(tmp_path, [lora(config)])
            run.fit(modules[0], loader())
            run.save_checkpoint(tmp_path / "it.ckpt")
            trainer(tmp_path, [lora(config)]).test(modules[1], loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False)
            assert not differing(*map(plain_values, modules))
