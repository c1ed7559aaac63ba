"""Where people train: Hugging Face's Trainer, Accelerate and Lightning, the real ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch_versions import DTensor, import_transformers, needs_fully_shard

import flatstep

OPTIONS = {"lr": 0.02, "weight_decay": 0.1}
CLASSES = [torch.optim.AdamW, flatstep.AdamW]
STEPS = 8


def rows() -> list[dict[str, Tensor]]:
    chance = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(8, generator=chance), "labels": torch.randn(4, generator=chance)}
        for _ in range(4 * STEPS)
    ]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": mse_loss(self.layers(x), labels)}


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def assert_trained_alike(one: nn.Module, other: nn.Module) -> None:
    start = Model()
    for ours, theirs, before in zip(
        one.parameters(), other.parameters(), start.parameters(), strict=True
    ):
        assert not torch.equal(ours, before)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# ---- Hugging Face's Trainer


class Trained:
    def __init__(self, trainer: Any) -> None:
        self.model: nn.Module = trainer.model
        self.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def hugging_face(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[nn.Module], dict[str, Any]],
    resume: int | None = None,
    **options: Any,
) -> Trained:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = import_transformers()
    model = Model()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        logging_steps=1,
        save_steps=STEPS // 2,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=OPTIONS["lr"],
        **options,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows(), **make(model))
    trainer.train(resume_from_checkpoint=resume and str(folder / f"checkpoint-{resume}"))
    return Trained(trainer)


def as_instance(cls: type[torch.optim.Optimizer], **more: Any) -> Callable[..., dict[str, Any]]:
    return lambda model: {"optimizers": (cls(model.parameters(), **OPTIONS, **more), None)}


def as_class(cls: type[torch.optim.Optimizer], **more: Any) -> Callable[..., dict[str, Any]]:
    return lambda _: {"optimizer_cls_and_kwargs": (cls, {**OPTIONS, **more})}


@pytest.mark.parametrize("given", [as_instance, as_class])
def test_trainer_trains_as_with_torch_and_resumes_to_the_bit(
    given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = (
        hugging_face(tmp_path / cls.__module__, monkeypatch, given(cls)) for cls in CLASSES
    )
    assert len(ours.losses) == STEPS
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert_trained_alike(ours.model, theirs.model)
    folder = tmp_path / flatstep.AdamW.__module__
    resumed = hugging_face(folder, monkeypatch, given(flatstep.AdamW), resume=STEPS // 2)
    assert resumed.losses == ours.losses
    assert_same_bits(resumed.model, ours.model)


@pytest.mark.parametrize("given", [as_instance, as_class])
def test_trainer_that_clips_too_is_told_of_once(
    given: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = given(flatstep.AdamW, max_grad_norm=0.5)
    with pytest.warns(
        UserWarning, match=r"by TrainingArguments\(max_grad_norm=1.0\).* use max_grad_norm=0 in"
    ) as said:
        twice = hugging_face(tmp_path, monkeypatch, make)
    assert len([warning for warning in said if warning.category is UserWarning]) == 1
    once = hugging_face(tmp_path, monkeypatch, make, max_grad_norm=0.0)
    assert_trained_alike(twice.model, once.model)


def test_trainer_that_clips_another_optimizer_is_not_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = nn.Parameter(torch.ones(4))
    other = flatstep.SGD([weight], lr=0.1, max_grad_norm=1.0)

    def make(model: nn.Module) -> dict[str, Any]:
        opt = flatstep.AdamW(model.parameters(), **OPTIONS)

        def step_other(*_: Any) -> None:
            weight.grad = torch.rand(4)
            other.step()

        opt.register_step_post_hook(step_other)
        return {"optimizers": (opt, None)}

    hugging_face(tmp_path, monkeypatch, make)
    assert other.grad_norm is not None


# ---- Accelerate


@pytest.fixture
def accelerator() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)


def accelerated(
    accelerator: Any,
    cls: type[torch.optim.Optimizer],
    clips: float | None = None,
    load: Path | None = None,
    save: Path | None = None,
    **options: Any,
) -> nn.Module:
    """A training in half of which gradients only accumulate; may begin or end in its middle."""
    model = Model()
    opt = cls(model.parameters(), **OPTIONS, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    loader = torch.utils.data.DataLoader(rows(), batch_size=2)  # type: ignore[arg-type, var-annotated]
    model, opt, loader, schedule = accelerator.prepare(model, opt, loader, schedule)
    if load is not None:
        accelerator.load_state(str(load))
    for place, batch in enumerate(loader):
        if load is not None and place < STEPS:
            continue
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            if clips is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clips)
            opt.step()
            schedule.step()
            opt.zero_grad()
        if save is not None and place + 1 == STEPS:
            accelerator.save_state(str(save))
    accelerator.free_memory()
    return model


def test_accelerate_trains_as_with_torch_in_bfloat16(accelerator: Any) -> None:
    theirs = accelerated(accelerator, torch.optim.AdamW, clips=0.5)
    assert_trained_alike(accelerated(accelerator, flatstep.AdamW, clips=0.5), theirs)
    assert_trained_alike(accelerated(accelerator, flatstep.AdamW, max_grad_norm=0.5), theirs)


def test_accelerate_goes_on_from_its_checkpoint_to_the_bit(
    accelerator: Any, tmp_path: Path
) -> None:
    options = {"max_grad_norm": 0.5, "ema_decay": 0.9}
    whole = accelerated(accelerator, flatstep.AdamW, save=tmp_path, **options)
    assert_same_bits(accelerated(accelerator, flatstep.AdamW, load=tmp_path, **options), whole)


def test_accelerate_that_clips_too_is_noticed(accelerator: Any) -> None:
    with pytest.warns(UserWarning, match="seem to be clipped twice: at 3 steps .* was 0.25"):
        accelerated(accelerator, flatstep.AdamW, clips=0.25, max_grad_norm=1.0)


@pytest.fixture
def sharding(accelerator: Any) -> Iterator[Any]:
    """Accelerate with FSDP2 on one process; by itself it shards on GPUs only."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )
    yield accelerator
    dist.destroy_process_group()


@needs_fully_shard
def test_accelerate_that_shards_exchanges_the_parameters(sharding: Any) -> None:
    model = Model()
    opt = flatstep.AdamW(model.parameters(), **OPTIONS, max_grad_norm=0.5)
    prepared, wrapped = sharding.prepare(model, opt)
    for row in rows()[:STEPS]:
        sharding.backward(prepared(**row)["loss"])
        wrapped.step()
        wrapped.zero_grad()
    for param, before in zip(prepared.parameters(), Model().parameters(), strict=True):
        assert isinstance(param, DTensor)
        assert isinstance(opt.state[param]["exp_avg"], DTensor)
        assert opt.state[param]["step"] == STEPS
        assert not torch.equal(param.full_tensor(), before)
    assert [*map(id, opt.state)] == [*map(id, prepared.parameters())]


# ---- Lightning

# Lightning's own: about the newest torch, what else the machine has, a folder that is used again.
accepts_lightning = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def lightning(
    folder: Path,
    cls: type[torch.optim.Optimizer],
    manual: bool = False,
    resume: bool = False,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Trains for two epochs, with a checkpoint between them."""
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()
            self.automatic_optimization = not manual

        def training_step(self, batch: dict[str, Tensor], place: int) -> Tensor | None:
            loss: Tensor = self.model(**batch)["loss"]
            if not manual:
                return loss
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            self.lr_schedulers().step()
            return None

        def configure_optimizers(self) -> Any:
            opt = cls(self.parameters(), **OPTIONS, **options)
            schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
            return [opt], [{"scheduler": schedule, "interval": "step"}]

    module = Module()
    save = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    fitting = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[save],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **(trainer or {}),
    )
    loader = torch.utils.data.DataLoader(rows(), batch_size=8)  # type: ignore[arg-type, var-annotated]
    fitting.fit(module, loader, ckpt_path=folder / "epoch=0.ckpt" if resume else None)
    return module


@pytest.mark.parametrize("manual", [False, True])
class TestLightning:
    pytestmark = accepts_lightning

    def test_trains_as_with_torch(self, manual: bool, tmp_path: Path) -> None:
        theirs, ours = (lightning(tmp_path / cls.__module__, cls, manual) for cls in CLASSES)
        assert_trained_alike(ours.model, theirs.model)

    def test_goes_on_from_its_checkpoint_to_the_bit(self, manual: bool, tmp_path: Path) -> None:
        options = {"max_grad_norm": 0.5, "ema_decay": 0.9}
        whole = lightning(tmp_path, flatstep.AdamW, manual, **options)
        resumed = lightning(tmp_path, flatstep.AdamW, manual, resume=True, **options)
        assert_same_bits(resumed, whole)


class TestLightningClips:
    pytestmark = accepts_lightning

    def test_as_with_torch(self, tmp_path: Path) -> None:
        clips = {"gradient_clip_val": 0.25}
        theirs, ours = (lightning(tmp_path / cls.__module__, cls, trainer=clips) for cls in CLASSES)
        assert_trained_alike(ours.model, theirs.model)
        inside = lightning(tmp_path / "inside", flatstep.AdamW, max_grad_norm=0.25)
        assert_trained_alike(inside.model, theirs.model)

    def test_not_in_mixed_precision_what_undoes_the_scale_itself(self, tmp_path: Path) -> None:
        clips = {"gradient_clip_val": 0.25, "precision": "bf16-mixed"}
        for cls in CLASSES:
            with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
                lightning(tmp_path / cls.__module__, cls, trainer=clips, fused=True)
        mixed = {"precision": "bf16-mixed"}
        module = lightning(tmp_path, flatstep.AdamW, trainer=mixed, fused=True, max_grad_norm=0.25)
        assert module.optimizers().optimizer.grad_norm is not None

    def test_and_is_told_of_where_the_optimizer_does_too(self, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match=r"by Trainer\(gradient_clip_val=0.25\)"):
            lightning(
                tmp_path, flatstep.AdamW, trainer={"gradient_clip_val": 0.25}, max_grad_norm=0.5
            )


# ---- loops of one's own


def loop(clips: Callable[[int, list[Tensor]], object], steps: int = 40, **options: Any) -> None:
    chance = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(64, generator=chance)) for _ in range(4)]
    opt = flatstep.AdamW(weights, **options)
    for step in range(steps):
        for weight in weights:
            weight.grad = torch.randn(64, generator=chance)
        clips(step, weights)
        opt.step()


def test_clipping_before_the_step_is_noticed_in_any_loop() -> None:
    with pytest.warns(UserWarning, match="clipped twice: at 3 steps in a row their norm was 2 "):
        loop(lambda _, weights: nn.utils.clip_grad_norm_(weights, 2.0), max_grad_norm=1.0)


def test_clipping_twice_is_told_of_before_anything_has_changed() -> None:
    weight = nn.Parameter(torch.ones(64))
    opt = flatstep.AdamW([weight], max_grad_norm=1.0)
    chance = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            before = weight.detach().clone(), float(opt.state.get(weight, {}).get("step", 0))
            weight.grad = torch.randn(64, generator=chance)
            nn.utils.clip_grad_norm_([weight], 1.0)
            try:
                opt.step()
            except UserWarning:
                break
        else:
            pytest.fail("nobody noticed")
    assert torch.equal(weight, before[0])
    assert opt.state[weight]["step"] == before[1] == 2
    opt.step()
    assert opt.state[weight]["step"] == 3


@pytest.mark.parametrize(
    ("clips", "options"),
    [
        (lambda _, weights: None, {"max_grad_norm": 1.0}),
        (lambda _, weights: nn.utils.clip_grad_norm_(weights, 1.0), {}),
        (lambda _, weights: nn.utils.clip_grad_norm_(weights, 1.0), {"skip_nonfinite": True}),
        # Two steps of three: a limit is not met by chance, but what comes late is not noticed.
        (
            lambda step, weights: step % 3 and nn.utils.clip_grad_norm_(weights, 1.0),
            {"max_grad_norm": 1.0},
        ),
        # Gradients that are always the same.
        (
            lambda _, weights: [weight.grad.fill_(0.999999 / 16) for weight in weights],
            {"max_grad_norm": 0.5},
        ),
    ],
)
def test_clipping_once_is_not_told_of(clips: Any, options: dict[str, Any]) -> None:
    loop(clips, **options)
