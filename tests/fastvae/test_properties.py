"""What holds for any configuration, shape and data, tried on those that hypothesis thinks of."""

import dataclasses
import json
import math
import tempfile
import typing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fastvae import checkpoints
from fastvae.config import Config, ModelConfig, ObjectiveConfig, OptimizerConfig, from_json
from fastvae.data import DataConfig, EpochOrder, ImageSet, load_data
from fastvae.errors import UserError
from fastvae.presets import PRESETS, preset
from fastvae.training import train
from fastvae.training.plan import Plan
from fastvae.training.together import shares

NUMBERS = st.one_of(
    st.integers(-2, 5),
    st.integers(-(2**53), 2**53),  # which floating point holds
    st.floats(),
    st.sampled_from([0.0, 0.5, 1.0, 1e-300, 1e300, math.inf, -math.inf, math.nan]),
)


def any_value(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotated type, sensible and not."""
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.one_of(st.integers(-2, 300), st.integers(-(2**70), 2**70))
    if kind is float:
        return NUMBERS
    if kind is str:
        return st.text(max_size=20)
    if kind is Path:
        return st.text("abc/.", max_size=9).map(Path)
    if kind is type(None):
        return st.none()
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return st.lists(any_value(typing.get_args(kind)[0]), max_size=3).map(tuple)
    return st.one_of(*map(any_value, typing.get_args(kind)))


@st.composite
def changes(draw: st.DrawFn, cls: type) -> dict[str, Any]:
    """A few fields of a configuration, with any values of their types."""
    kinds = typing.get_type_hints(cls)
    own = [f.name for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(kinds[f.name])]
    names = draw(st.lists(st.sampled_from(own), max_size=4, unique=True))
    return {name: draw(any_value(kinds[name])) for name in names}


@pytest.mark.parametrize("examples", [400, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_configuration_is_refused_in_words_or_survives_json(examples: int) -> None:
    settings(max_examples=examples, deadline=None)(is_refused_or_survives_json)()


@given(
    st.sampled_from(sorted(PRESETS)),
    changes(Config),
    changes(ModelConfig),
    changes(ObjectiveConfig),
    changes(OptimizerConfig),
    changes(DataConfig),
)
def is_refused_or_survives_json(
    name: str, top: Any, model: Any, objective: Any, optimizer: Any, data: Any
) -> None:
    try:
        base = preset(name)
        config = dataclasses.replace(
            base,
            **top,
            model=dataclasses.replace(base.model, **model),
            objective=dataclasses.replace(base.objective, **objective),
            optimizer=dataclasses.replace(base.optimizer, **optimizer),
            data=dataclasses.replace(base.data, **data),
        )
    except UserError as error:
        assert len(str(error)) > 10
        return
    text = config.to_json()
    try:
        again = from_json(text, "config.json")
    except UserError as error:
        # What JSON does not know (infinity), or is no plain number of 64 bits.
        assert "is no configuration of a run" in str(error) or "is not JSON" in str(error)
        return
    assert json.loads(again.to_json()) == json.loads(text)


@st.composite
def small_configurations(draw: st.DrawFn) -> Config | str:
    """Any model and objective of the library with other parts and settings, made small; or why it
    is none: impossible combinations are refused when they are made."""
    base = preset(draw(st.sampled_from(sorted(PRESETS))))
    kinds = typing.get_type_hints(ModelConfig)
    sizes = st.integers(1, 7)
    free = {name: any_value(kinds[name]) for name in ("network", "activation", "likelihood")}
    free |= {"prior": any_value(kinds["prior"]), "conditional": st.booleans()}
    names = draw(st.lists(st.sampled_from(sorted(free)), max_size=2, unique=True))
    try:
        model = dataclasses.replace(base.model, hidden=tuple(draw(st.lists(sizes, max_size=3))))
        if model.target == "images":
            model = dataclasses.replace(model, latent_dim=draw(sizes))
            model = dataclasses.replace(model, **{name: draw(free[name]) for name in names})
            # What the others do not read is refused where it is set.
            small: dict[str, Any] = {}
            if model.network == "conv":
                small["widths"] = tuple(draw(st.lists(sizes, min_size=1, max_size=3)))
                small["pooling"] = draw(st.booleans())
            if model.likelihood == "gaussian":
                small["variance"] = draw(st.sampled_from(["learned", "predicted", 0.1]))
            if model.likelihood == "categorical":
                small["levels"] = 4
            if model.likelihood == "logistic-mixture":
                small["mixtures"] = 2
            if model.prior in ("mixture", "vamp"):
                small["prior_components"] = 3
            model = dataclasses.replace(model, **small)
        return dataclasses.replace(
            base,
            data=DataConfig(
                data="diabetes" if base.data.data == "diabetes" else "digits",
                train_limit=draw(st.integers(1, 90)),
                heldout_limit=draw(st.integers(1, 9)),
            ),
            model=model,
            optimizer=dataclasses.replace(
                base.optimizer,
                optimizer=draw(st.sampled_from(["adam", "adamw", "muon"])),
                schedule=draw(st.sampled_from(["constant", "cosine", "step", "stages"])),
                ema_decay=draw(st.sampled_from([0.0, 0.9])),
            ),
            batch_size=draw(st.integers(1, 40)),
            gradient_accumulation_steps=draw(st.sampled_from([1, 1, 1, 3])),
            max_steps=2,
            log_every=1,
            compile="off",
        )
    except UserError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("examples", [15, pytest.param(150, marks=pytest.mark.slow)])
def test_any_combination_trains_or_is_refused(
    examples: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    trained: list[str] = []

    @settings(max_examples=examples, deadline=None)
    @given(config=small_configurations())
    def each(config: Config | str) -> None:
        trains_or_is_refused(config, tmp_path_factory.mktemp("any") / "run", trained)

    each()
    assert len(trained) > 7 * examples / 30  # the others were refused


def trains_or_is_refused(config: Config | str, output: Path, trained: list[str]) -> None:
    if isinstance(config, str):
        assert len(config) > 10
        return
    for state in (GradientState, AcceleratorState, PartialState):
        state._reset_state()
    try:
        run = train(dataclasses.replace(config, output=output), name="any")
    except UserError as error:
        assert len(str(error)) > 10
        return
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = Plan.of(config, config.data.train_limit or 0).steps
    assert [line["step"] for line in lines] == [1, 2][:steps]
    assert all(math.isfinite(line["loss"]) for line in lines)
    found = json.loads((run / "results.json").read_text())["heldout"]
    assert found["images"] == config.data.heldout_limit
    assert checkpoints.newest(run)[0].step == steps
    trained.append(run.parent.name)


@settings(max_examples=400, deadline=None)
@given(
    arrays.arrays(
        st.sampled_from([np.uint8, np.bool_, np.float32, np.float64, np.int32, np.complex64]),
        arrays.array_shapes(min_dims=1, max_dims=5, max_side=4),
    )
)
def test_any_array_becomes_images_or_is_refused(array: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.npy")
        np.save(path, array)
        try:
            train_set, heldout = load_data(DataConfig(data=str(path)), seed=0)
        except UserError as error:
            assert "a.npy" in str(error)
            return
    assert array.ndim in (3, 4) and len(train_set) + len(heldout) == len(array)
    for part in (train_set, heldout):
        images = part.tensor
        assert images.dtype in (torch.uint8, torch.float32) and images.ndim == 4
        assert images.shape[1] in (1, 3) and images.is_contiguous()
        assert float(images.double().min()) >= 0
        assert float(images.double().max()) <= (255 if images.dtype == torch.uint8 else 1)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**62), st.integers(0, 500), st.integers(0, 200))
def test_every_sample_once_an_epoch(size: int, seed: int, position: int, count: int) -> None:
    order = EpochOrder(size, seed)
    found = order.indices(position, count).tolist()
    assert found == [order.indices(position + i, 1).item() for i in range(count)]
    for epoch in range(3):
        assert sorted(order.indices(epoch * size, size).tolist()) == list(range(size))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 64), st.integers(1, 16))
def test_shares(rows: int, parts: int, processes: int) -> None:
    found = shares(rows, parts * processes)
    assert [i for cut in found for i in (cut.start, cut.stop)][:1] == [0]
    assert all(a.stop == b.start for a, b in pairwise(found))
    assert found[-1].stop == rows
    assert max(map(len, found)) - min(map(len, found)) <= 1
    # What the processes take together as part p is what one alone takes as part p.
    for part, alone in enumerate(shares(rows, parts)):
        together = found[part * processes : (part + 1) * processes]
        assert (together[0].start, together[-1].stop) == (alone.start, alone.stop)


@settings(max_examples=200, deadline=None)
@given(
    st.floats(0.01, 50),
    st.integers(1, 3000),
    st.integers(1, 500),
    st.integers(1, 40),
    st.floats(0.01, 5),
    st.floats(0.01, 5),
)
def test_nothing_due_is_passed_over(
    epochs: float, samples: int, batch: int, log: int, every: float, keep: float
) -> None:
    config = Config(
        epochs=epochs, batch_size=batch, log_every=log, eval_every=every, checkpoint_every=keep,
        max_steps=300,
    )  # fmt: skip
    plan = Plan.of(config, samples)
    done, due = 0, []
    while done < plan.steps:
        done += plan.undisturbed(done, config)
        due.append(done)
    assert due[-1] == plan.steps
    for step in range(1, plan.steps + 1):
        is_due = plan.is_line_due(step, config) or plan.is_checkpoint_due(step, config)
        assert is_due == (step in due)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(-1e3, 1e3)), min_size=1, max_size=8),
    st.integers(1, 4),
)
def test_checkpoints_that_stay(bounds: list[float | None], newest: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        for step, bound in enumerate(bounds):
            checkpoints.commit(
                run, step, lambda f: (f / "a").write_bytes(b"") and None, heldout=bound
            )
            checkpoints.keep(run, newest)
        left = [checkpoints.read_manifest(f).step for f in checkpoints.folders(run)]
    measured = [(bound, step) for step, bound in enumerate(bounds) if bound is not None]
    expected = set(range(len(bounds))[-newest:]) | ({max(measured)[1]} if measured else set())
    assert set(left) == expected


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 4),
    st.lists(st.integers(-40, 40), max_size=20),
    st.booleans(),
)
def test_selecting(count: int, side: int, indices: list[int], labelled: bool) -> None:
    """As NumPy selects."""
    images = torch.randint(256, (count, 1, side, side), dtype=torch.uint8)
    data = ImageSet(images, torch.arange(count) if labelled else None, "any")
    inside = [i for i in indices if -count <= i < count]
    if not inside:
        return
    found = data.select(inside)
    assert np.array_equal(found.tensor.numpy(), images.numpy()[inside])
    if labelled:
        assert found.labels is not None
        assert found.labels.tolist() == [i % count for i in inside]
