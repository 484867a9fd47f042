"""Two processes over gloo: equal weights on both ranks, small files, exact resume, or a refusal by name."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.nn.functional import cross_entropy

from lora_plugins import AdapterFileError, InitData, LoraConfig, LoraModel, StateError
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint
from lora_plugins.integrations.lightning.cli import merge_checkpoint
from tests.integrations.lightning.strategies.distributed_runs import (
    HEADED,
    LEARNED,
    WIDE,
    FsdpOnCpu,
    NoNorm,
    Sharded,
    whole,
)
from tests.integrations.lightning.toys import CONFIG, differing, load, loader, trainer, values


def launch(name, folder, code=0):
    command = [sys.executable, "-m", "tests.integrations.lightning.strategies.distributed_runs", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert (done.returncode == 0) == (code == 0), done.stderr[-4000:]
    return done.stderr


def dump(folder, name, rank):
    return torch.load(folder / f"{name}-{rank}.pt")


def test_ddp(tmp_path):
    launch("ddp", tmp_path)
    trained = sum(tensor.numel() for tensor in dump(tmp_path, "straight", 0).values())
    assert torch.load(tmp_path / "communicated.pt") == {"sent": [trained] * 4, "unused": False}
    for name in ("straight", "half", "resumed", "merged", "merged-state"):
        assert not differing(dump(tmp_path, name, 0), dump(tmp_path, name, 1)), name
    assert not differing(dump(tmp_path, "straight", 0), dump(tmp_path, "resumed", 0))
    assert set(load(tmp_path / "half.ckpt")["state_dict"]) == set(dump(tmp_path, "half", 0))
    alone = load_from_checkpoint(NoNorm, tmp_path / "half.ckpt")
    assert not differing({k: values(alone)[k] for k in dump(tmp_path, "half", 0)}, dump(tmp_path, "half", 0))
    again = NoNorm()
    LoraModel.load_adapter(again, tmp_path / "adapter").merge_and_unload()
    assert not differing(values(again), dump(tmp_path, "merged-state", 0))


@pytest.mark.slow
def test_inits_that_learn_from_data_agree_on_all_ranks(tmp_path):
    launch("learned", tmp_path)
    for name, config in LEARNED.items():
        first, second = dump(tmp_path, name, 0), dump(tmp_path, name, 1)
        assert not differing(first, second)
        # The ranks read half of the data each; the init saw the sum.
        step = lambda module, batch: cross_entropy(module(batch[0]), batch[1])  # noqa: E731
        alone = LoraModel(NoNorm(), config, init_data=InitData(loader(), step))
        loaded = LoraModel.load_adapter(NoNorm(), tmp_path / f"{name}-0")
        assert loaded.plans["default"].layers == alone.plans["default"].layers
        assert not differing(values(loaded.model), first)
        for key, value in values(alone.model).items():
            if ".lora_" not in key:
                torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_all_ranks_have_the_best_weights_of_the_first(tmp_path):
    launch("best", tmp_path)
    first, second = dump(tmp_path, "best-state", 0), dump(tmp_path, "best-state", 1)
    assert not differing(first, second)
    assert differing(first, dump(tmp_path, "best", 0))  # the last ones


@pytest.mark.slow
def test_all_ranks_refuse_what_the_first_one_does(tmp_path):
    launch("refused", tmp_path)
    first, second = ((tmp_path / f"refused-{rank}.txt").read_text() for rank in (0, 1))
    assert first == second
    assert "save_adapter_to is" in first


@pytest.mark.slow
def test_ddp_names_what_is_unused(tmp_path):
    error = launch("unused", tmp_path, code=1)
    assert "spare" in error


@pytest.mark.slow
def test_spawned_processes_bring_the_merged_weights_back(tmp_path):
    said = launch("spawned", tmp_path)
    merged, lost = (torch.load(tmp_path / f"spawned-state-{merge}.pt") for merge in (True, False))
    assert differing(merged, values(NoNorm(width=WIDE))) == {"net.0.weight", "net.3.weight"}
    assert not differing(lost, values(NoNorm(width=WIDE)))
    assert "will have no adapter" in said
    found = torch.load(tmp_path / "spawned-found.pt")
    metric = found["checkpoint"][0]["val/loss"]
    assert metric == pytest.approx(found["merged"][0]["val/loss"], rel=1e-5)  # the merged weight is rounded once
    assert found["merged_again"] == found["merged"]


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp2")
    launch("fsdp2", folder)
    return folder


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """The folder of the runs of one kind, which are done once."""

    def folder(kind):
        if kind != "fsdp":
            return request.getfixturevalue("fsdp2")
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            launch(kind, made[kind])
        return made[kind]

    made = {}
    return folder


def test_fsdp2_sends_the_gradients_of_the_adapter_only(fsdp2):
    counted = torch.load(fsdp2 / "scattered.pt")
    shapes = [tensor.shape for tensor in dump(fsdp2, "scattered", 0).values()]
    padded = sum(-(-shape[0] // 2) * 2 * shape[1:].numel() for shape in shapes)  # rows are split among two ranks
    assert counted["sent"] == padded * counted["steps"] > 0


def test_validation_changes_nothing_of_what_fsdp2_trains(fsdp2):
    expected, *found = dump(fsdp2, "unvalidated", 0), *(dump(fsdp2, "validated", rank) for rank in (0, 1))
    for each in found:
        assert each.keys() == expected.keys()
        assert all(torch.equal(tensor, each[name]) for name, tensor in expected.items())
    assert load(fsdp2 / "validated.ckpt")["state_dict"].keys() == expected.keys()


def test_base_stays_out_of_files_of_fsdp2_where_the_callback_was_in_a_run_of_ddp_before(fsdp2):
    assert load(fsdp2 / "after_ddp.ckpt")["state_dict"].keys() == load(fsdp2 / "validated.ckpt")["state_dict"].keys()


@pytest.mark.parametrize("kind", ["full", "distributed", pytest.param("fsdp", marks=pytest.mark.slow)])
class TestSharded:
    """`ModelParallelStrategy` (FSDP2), with checkpoints of one file and of one file a process; `FSDPStrategy`."""

    def test_ranks_hold_one_adapter(self, runs, kind):
        folder = runs(kind)
        for name in ("straight", "half", "resumed"):
            assert not differing(dump(folder, f"{kind}-{name}", 0), dump(folder, f"{kind}-{name}", 1)), name

    def test_it_is_that_of_one_process(self, runs, kind):
        folder = runs(kind)
        torch.manual_seed(1)
        module = Sharded()
        samples = [torch.cat(parts) for parts in zip(*loader(), strict=True)]
        LoraModel(module, HEADED)
        optimizer = module.configure_optimizers()[0][0]
        order = torch.randperm(32, generator=torch.Generator().manual_seed(0))  # of Lightning's DistributedSampler
        batches = [torch.cat([order[rank::2][start : start + 8] for rank in (0, 1)]) for start in (0, 8)]
        for batch in batches:
            cross_entropy(module(samples[0][batch]), samples[1][batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
        found = dump(folder, f"{kind}-half", 0)
        for name, parameter in module.named_parameters():
            if name in found:
                torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-4, atol=1e-6)  # order of sums

    def test_resumed_is_straight(self, runs, kind):
        folder = runs(kind)
        assert not differing(dump(folder, f"{kind}-straight", 0), dump(folder, f"{kind}-resumed", 0))
        assert differing(dump(folder, f"{kind}-half", 0), dump(folder, f"{kind}-resumed", 0))

    def test_checkpoint_holds_what_is_trained(self, runs, kind):
        folder = runs(kind)
        trained = set(dump(folder, f"{kind}-half", 0))
        path = folder / f"{kind}.ckpt"
        if kind == "full":
            assert set(load(path)["state_dict"]) == trained
        else:
            keys = FileSystemReader(path).read_metadata().state_dict_metadata
            prefix = "model." if kind == "fsdp" else "state_dict."
            assert {k.removeprefix(prefix) for k in keys if k.startswith(prefix)} == trained
        assert not list(folder.glob(".*"))

    def test_adapter_folder_is_whole(self, runs, kind):
        folder = runs(kind)
        module = Sharded()
        LoraModel.load_adapter(module, folder / f"{kind}-half-adapter")
        trained = dump(folder, f"{kind}-half", 0)
        assert not differing({key: values(module)[key] for key in trained}, trained)

    def test_predictions_of_a_new_process_are_those_of_one_process(self, runs, kind):
        folder = runs(kind)
        module = Sharded()
        LoraModel.load_adapter(module, folder / f"{kind}-half-adapter")
        module.eval()
        (x,) = [torch.cat([batch[0] for batch in loader()])]
        parts = [torch.cat(torch.load(folder / f"{kind}-predictions-{rank}.pt")) for rank in (0, 1)]
        torch.testing.assert_close(torch.stack(parts, 1).flatten(0, 1), module(x).detach())


def test_file_of_fsdp2_loads_merges_and_exports_in_one_process(fsdp2, tmp_path):
    module = load_from_checkpoint(Sharded, fsdp2 / "full.ckpt")
    trained = dump(fsdp2, "full-half", 0)
    assert not differing({key: values(module)[key] for key in trained}, trained)
    merged = Sharded.load_from_checkpoint(merge_checkpoint(Sharded, fsdp2 / "full.ckpt", tmp_path / "it.ckpt"))
    x = torch.randn(4, 4)
    torch.testing.assert_close(merged(x), module(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp-goes-on", "distributed-goes-on"])
def test_training_goes_on_with_the_folder_of_the_other_way_to_shard(runs, name):
    folder = runs("fsdp")
    torch.testing.assert_close(dump(folder, name, 0), dump(folder, "fsdp-straight", 0))


@pytest.mark.slow
def test_fsdp_trains_a_head_of_its_own_that_configure_model_builds(runs):
    folder = runs("fsdp")
    first, second = dump(folder, "head-built-late", 0), dump(folder, "head-built-late", 1)
    assert not differing(first, second)
    assert any(name.endswith("head.weight") for name in first)


class BuiltLate(Sharded):
    def __init__(self, **options):
        super().__init__(**options)
        self.built = self.net
        del self._modules["net"]

    def configure_model(self):
        self.net = self._modules.pop("built")
        super().configure_model()


class OnMeta(Sharded):
    def __init__(self, **options):
        with torch.device("meta"):
            super().__init__(**options)


STORING = replace(CONFIG, target_modules=["net.0"], quantize="nf4", quantize_options={"min_size": 0})

REFUSED = {
    "merge": (Sharded, {"merge_on_fit_end": True}, "ModelParallelStrategy splits.*Set 'merge_on_fit_end=False'"),
    "export": (Sharded, {"export_to": "x.safetensors"}, "ModelParallelStrategy splits.*export_to"),
    "best": (Sharded, {"merge_source": "best"}, "ModelParallelStrategy splits.*merge_source"),
    "sharded before injection": (
        BuiltLate,
        {},
        r"which shards .* could not be adapted: .*'net\.0'.*build them in __init__",
    ),
    "meta device": (OnMeta, {}, "'net.0.weight'.*meta device"),
    "init that changes the base": (
        Sharded,
        {"config": LoraConfig(r=2, target_modules=["net.0"], init="loftq")},
        "loftq",
    ),
    "stored weights": (Sharded, {"config": STORING}, r"'net\.0\.weight' are stored in fewer bytes.*ModelParallelStra"),
    "init that learns from data": (
        Sharded,
        {"config": LoraConfig(r=2, target_modules=["net.0"], init="eva")},
        "ModelParallelStrategy splits .* before an init can learn from data",
    ),
}


@pytest.fixture
def one_process():
    yield lambda **options: ModelParallelStrategy(1, 1, process_group_backend="gloo", **options)
    if torch.distributed.is_initialized():  # not by a test that was skipped
        torch.distributed.destroy_process_group()  # Lightning leaves it to the end of the process


def fsdp(**options):
    return FsdpOnCpu(process_group_backend="gloo", state_dict_type="sharded", **options)


def trained(run):
    """The names of what a run of FSDP has trained."""
    parameters = run.strategy.model.named_parameters()
    return {name.removeprefix("_fsdp_wrapped_module.") for name, each in parameters if each.requires_grad}


@pytest.mark.parametrize(("cls", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_sharding_cannot_do_is_refused_by_name(tmp_path, one_process, cls, options, message):
    lora = LoraCallback(options.pop("config", CONFIG), **{"merge_on_fit_end": False, **options})
    with pytest.raises(StateError, match=message):
        trainer(tmp_path, [lora], strategy=one_process()).fit(cls(), loader())


def two_callbacks():
    """For one module, of which `BuiltLate` has the layers of the second callback from `configure_model` on."""
    configs = {"first": LoraConfig(r=2, target_modules=["head"]), "second": CONFIG}
    return [LoraCallback(config, adapter_name=name, merge_on_fit_end=False) for name, config in configs.items()]


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("fsdp2", r"which shards .* could not be adapted: .*'net\.0'.*build them in __init__"),
        ("fsdp", r"the adapter 'second' could not be added as others were: .*'net\.0'.*in __init__"),
    ],
    ids=["fsdp2", "fsdp"],
)
def test_layers_that_one_of_two_callbacks_misses_are_named(tmp_path, one_process, strategy, message):
    run = trainer(tmp_path, two_callbacks(), strategy=fsdp() if strategy == "fsdp" else one_process())
    with pytest.raises(StateError, match=message):
        run.fit(BuiltLate(), loader())


class BuildsAgain(Sharded):
    def configure_model(self):
        self.net = NoNorm().net
        super().configure_model()


WITHIN = replace(CONFIG, target_modules=["0"])


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize(
    ("config", "target", "message"),
    [
        (CONFIG, None, r"replaced by others.*'net\.0'.*configure_model"),
        (WITHIN, "net", "built 'net' again after"),
    ],
    ids=["module", "target"],
)
def test_layers_that_configure_model_builds_again_are_named(
    tmp_path, one_process, strategy, config, target, message, stage
):
    lora = LoraCallback(config, target=target, merge_on_fit_end=False)
    run = trainer(tmp_path, [lora], strategy=fsdp() if strategy == "fsdp" else one_process())
    with pytest.raises(StateError, match=message):
        getattr(run, stage)(BuildsAgain(), loader())


class BuildsInSetup(NoNorm):
    def setup(self, stage):
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.net(x))


@pytest.mark.filterwarnings("ignore:FSDP is switching to use .NO_SHARD.:UserWarning")  # there is one process
def test_fsdp_trains_layers_that_setup_builds(tmp_path, one_process):
    lora = LoraCallback(LoraConfig(r=2, target_modules="all"), merge_on_fit_end=False)
    run = trainer(tmp_path, [lora], strategy=fsdp())
    run.fit(BuildsInSetup(), loader())
    layers = ("net.0", "net.3", "head")
    assert trained(run) == {f"{layer}.lora_{tensor}.default" for layer in layers for tensor in "AB"}


WRONG_FILES = {
    "no adapter": (lambda: (Sharded(), []), "holds no adapter"),
    "another rank": (lambda: (Sharded(), [LoraCallback(LoraConfig(r=3, target_modules=["net.0"]))]), "r is 3 in the"),
    "another base": (lambda: (Sharded(base_seed=1), [LoraCallback(CONFIG)]), "another base"),
    "another model": (lambda: (Sharded(width=8), [LoraCallback(CONFIG)]), "another model"),
    "another adapter": (lambda: (Sharded(), [LoraCallback(CONFIG, adapter_name="other")]), "adapter 'other'"),
    "of one device": (lambda: (Sharded(), [LoraCallback(CONFIG)]), "training cannot resume from it here"),
}


@pytest.mark.parametrize(("made", "message"), WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_wrong_file_is_refused_by_a_sharded_module(tmp_path, one_process, made, message):
    module, callbacks = made()
    module.configure_model = lambda: None
    for lora in callbacks:
        lora.merge_on_fit_end = False
    writer = trainer(tmp_path, callbacks, max_epochs=1)
    writer.fit(module, loader())
    writer.save_checkpoint(tmp_path / "it.ckpt")
    run = trainer(tmp_path, [LoraCallback(CONFIG, merge_on_fit_end=False)], strategy=one_process())
    with pytest.raises(AdapterFileError, match=message):
        run.fit(Sharded(), loader(), ckpt_path=tmp_path / "it.ckpt")


def test_file_of_one_device_is_tested_by_a_sharded_module(tmp_path, one_process):
    module = Sharded()
    module.configure_model = lambda: None
    writer = trainer(tmp_path, [LoraCallback(CONFIG, merge_on_fit_end=False)], max_epochs=1)
    writer.fit(module, loader())
    writer.save_checkpoint(tmp_path / "it.ckpt")
    expected = writer.validate(module, loader(), verbose=False)
    run = trainer(tmp_path, [LoraCallback(CONFIG, merge_on_fit_end=False)], strategy=one_process())
    found = run.validate(Sharded(), loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False)
    assert found[0]["val/loss"] == pytest.approx(expected[0]["val/loss"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch 2.8 writes sharded files by it
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "full"])
def test_stages_follow_one_another_on_a_sharded_module(tmp_path, one_process, distributed):
    lora = LoraCallback(CONFIG, merge_on_fit_end=False)
    run = trainer(tmp_path, [lora], strategy=one_process(save_distributed_checkpoint=distributed), inference_mode=False)
    module = Sharded()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    trained = {name: whole(p) for name, p in module.named_parameters() if p.requires_grad}
    run.fit_loop.max_epochs = 3
    run.fit(module, loader())
    run.test(module, loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False)
    assert not differing({n: whole(p) for n, p in module.named_parameters() if p.requires_grad}, trained)


class OfAFolder(Sharded):
    def __init__(self, folder):
        super().__init__()
        self.save_hyperparameters("folder")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch 2.8 writes sharded files by it
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "full"])
def test_a_path_among_hyperparameters_is_read_by_a_sharded_module(tmp_path, one_process, distributed):
    lora, strategy = LoraCallback(CONFIG, merge_on_fit_end=False), one_process(save_distributed_checkpoint=distributed)
    run = trainer(tmp_path, [lora], strategy=strategy, inference_mode=False, max_epochs=1)
    run.fit(module := OfAFolder(tmp_path), loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    run.test(module, loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch 2.8 writes sharded files by it
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("bit", r"is damaged: '.*\.distcp'"),
        ("missing", r"is damaged: '.*\.distcp'"),
        ("no sums", r"has no sums\.json: it is not whole"),
    ],
    ids=["bit", "missing", "no sums"],
)
def test_a_damaged_file_of_a_distributed_checkpoint_is_found(tmp_path, one_process, damage, message):
    lora = LoraCallback(CONFIG, merge_on_fit_end=False)
    run = trainer(tmp_path, [lora], strategy=one_process(save_distributed_checkpoint=True), max_epochs=1)
    module = Sharded()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    (path,) = (tmp_path / "it.ckpt").glob("*.distcp")
    factor = next(whole(p) for name, p in module.named_parameters() if "lora_B" in name).detach().numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(factor) + 2] ^= 1
    path.write_bytes(content)
    if damage == "missing":
        path.unlink()
    if damage == "no sums":
        (tmp_path / "it.ckpt" / "sums.json").unlink()
    run.fit_loop.max_epochs = 2
    with pytest.raises(AdapterFileError, match=message):
        run.fit(module, loader(), ckpt_path=tmp_path / "it.ckpt")


@pytest.mark.filterwarnings("ignore:net has both parameters with requires_grad:UserWarning")  # on memory
@pytest.mark.filterwarnings("ignore:FSDP is switching to use .NO_SHARD.:UserWarning")  # there is one process
@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "FsdpOnCpu with state_dict_type='sharded' only"), ({"state_dict_type": "sharded"}, "wrapped 'net'.*policy")],
    ids=["full state dict", "auto_wrap_policy"],
)
def test_what_fsdp_cannot_do_is_refused_by_name(tmp_path, one_process, options, message):
    policy = {} if not options else {"auto_wrap_policy": {nn.Sequential}}
    strategy = FsdpOnCpu(process_group_backend="gloo", **options, **policy)
    with pytest.raises(StateError, match=message):
        trainer(tmp_path, [LoraCallback(CONFIG, merge_on_fit_end=False)], strategy=strategy).fit(NoNorm(), loader())


@pytest.mark.filterwarnings("ignore:FSDP is switching to use .NO_SHARD.:UserWarning")  # there is one process
def test_fsdp_trains_a_module_that_the_trainer_casts(tmp_path, one_process):
    lora = LoraCallback(CONFIG, merge_on_fit_end=False)
    run = trainer(tmp_path, [lora], strategy=fsdp(), precision="bf16-true")
    run.fit(NoNorm(), loader())
    assert {parameter.dtype for parameter in run.strategy.model.parameters()} == {torch.bfloat16}


def stored_by_us(module):
    LoraModel(module, STORING).unload(dequantize=False)


def stored_by_torchao(module):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(module.net[0], torchao.IntxWeightOnlyConfig(torch.int8))


BEFORE = {
    "now": (lambda module: None, STORING),
    "before": (stored_by_us, CONFIG),
    "torchao": (stored_by_torchao, CONFIG),
}


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize(("store", "config"), BEFORE.values(), ids=BEFORE)
def test_stored_weights_are_refused_by_fsdp_before_anything_is_touched(tmp_path, one_process, store, config, stage):
    module = NoNorm()
    store(module)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in module.state_dict(keep_vars=True).items()}
    classes = [type(each) for each in module.modules()]
    run = trainer(tmp_path, [LoraCallback(config, merge_on_fit_end=False)], strategy=fsdp())
    with pytest.raises(StateError, match=r"'net\.0\.weight' are stored in fewer bytes, .* as FsdpOnCpu does"):
        getattr(run, stage)(module, loader())
    after = module.state_dict(keep_vars=True)
    assert [type(each) for each in module.modules()] == classes
    assert [*after] == [*before]
    assert all(after[name] is not None and id(after[name]) == was for name, (was, _) in before.items())
