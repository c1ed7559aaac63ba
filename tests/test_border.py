"""The border to C++: a call that makes no sense raises, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import VARIANTS, address
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from flatstep import _core, reference

REFUSED = (ValueError, TypeError, RuntimeError, IndexError, OverflowError)
COUNT = 8


EXTRAS = _core.EXTRAS
BF16, F16 = (_core.layouts().index((dtype,) * 3) for dtype in ("bfloat16", "float16"))

# ---- update


def call_update(**changes: Any) -> None:
    """A call of Adam's update that would be right, but for the changes."""
    arrays = {name: np.ones(COUNT, np.float32) for name in ("param", "grad", "m", "v")}
    untouched = {name: x.copy() for name, x in arrays.items()}
    arguments = {
        "rule": "adam",
        "flags": 0,
        "layout": 0,
        "param": address(arrays["param"]),
        "grad": address(arrays["grad"]),
        "states": [address(arrays["m"]), address(arrays["v"])],
        "count": COUNT,
        "hyper": [0.1, 0.9, 0.999, 1e-8, 0.0],
        "step": 1,
        "scale": 1.0,
        "threads": 1,
    }
    states = changes.pop("states", lambda states: states)
    try:
        _core.update(**arguments | changes | {"states": states(arguments["states"])})
    finally:
        for name, x in arrays.items():
            np.testing.assert_array_equal(x, untouched[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": "lion"},
        {"rule": ""},
        {"rule": None},
        {"flags": 4},
        {"flags": 2**32 - 1},
        {"flags": 2**40},
        {"flags": -1},
        {"flags": 0.5},
        {"rule": "sgd", "flags": 2, "hyper": [0.1, 0.9, 0.0, 0.0]},  # nesterov without momentum
        {"layout": -1},
        {"layout": len(_core.layouts())},
        {"param": 0},
        {"param": -8},
        {"param": 2**70},
        {"param": "p"},
        {"grad": 0},
        {"grad": None},
        {"states": lambda states: []},
        {"states": lambda states: states[:1]},
        {"states": lambda states: [*states, states[0]]},
        {"states": lambda states: [states[0], 0]},
        {"states": lambda states: None},
        {"states": lambda states: ["m", "v"]},
        {"count": -1},
        {"count": 2**70},
        {"count": 8.5},
        {"hyper": []},
        {"hyper": [0.1] * 4},
        {"hyper": [0.1] * 6},
        {"hyper": ["lr"] * 5},
        {"step": 0},
        {"step": -1},
        {"step": 2**64},
        {"scale": None},
        {"threads": "two"},
        {"flags": EXTRAS["master_copy"], "master": 64},
        {"flags": EXTRAS["master_split"], "layout": BF16},
        {"flags": EXTRAS["master_split"], "layout": F16, "master": 64},
        {"flags": EXTRAS["master_split"] | EXTRAS["master_copy"], "layout": BF16, "master": 64},
        {"flags": EXTRAS["stochastic"]},
        {"flags": EXTRAS["average"]},
        {"flags": 2 * max(EXTRAS.values())},
        {"master": 64},
        {"average": 64},
        {"seed": -1},
        {"first": 2**32},
    ],
    ids=str,
)
def test_an_update_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(REFUSED):
        call_update(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"grads": [0]},
        {"grads": [-8]},
        {"grads": []},
        {"dtypes": ["int16"]},
        {"dtypes": ["float8"]},
        {"dtypes": []},
        {"counts": [-1]},
        {"counts": [2**70]},
        {"counts": [COUNT, COUNT]},
        {"largest": "yes", "dtypes": None},
        {"threads": "two"},
    ],
    ids=str,
)
def test_a_norm_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    grad = np.ones(COUNT, np.float32)
    arguments = {
        "grads": [address(grad)],
        "dtypes": ["float32"],
        "counts": [COUNT],
        "largest": False,
        "threads": 1,
    }
    assert _core.norms(**arguments) == [COUNT]
    with pytest.raises(REFUSED):
        _core.norms(**arguments | changes)
    with pytest.raises(REFUSED):
        _core.tile_norms(**arguments | changes)


def test_tiles_are_those_of_the_norm() -> None:
    count = 2 * reference.TILE + 5
    grad = np.full(count, 2.0, np.float32)
    for largest in (False, True):
        raw = _core.tile_norms([grad.ctypes.data], ["float32"], [count], largest, 1)
        tiles = np.frombuffer(raw)
        assert tiles.tolist() == ([2.0] * 3 if largest else [4.0 * reference.TILE] * 2 + [20.0])
        norms = _core.norms([grad.ctypes.data], ["float32"], [count], largest, 1)
        assert [_core.total_of_tiles(tiles.ctypes.data, [2, 1], largest)] == norms


@pytest.mark.parametrize(("tiles", "counts"), [(0, [1]), (64, [-1])])
def test_tiles_that_are_not_there_are_refused(tiles: int, counts: list[int]) -> None:
    with pytest.raises(REFUSED):
        _core.total_of_tiles(tiles, counts, False)


def test_an_unknown_rule_is_answered_with_those_that_exist() -> None:
    with pytest.raises(
        ValueError, match=rf"'lion'.*{', '.join(rule['name'] for rule in _core.rules())}"
    ):
        call_update(rule="lion")


@pytest.mark.parametrize("threads", [-(2**31), -1, 0, 2**31 - 1])
def test_any_number_of_threads_is_fine(threads: int) -> None:
    with pytest.raises(AssertionError):  # of call_update: the parameter has changed
        call_update(threads=threads)


def test_an_update_of_nothing_needs_no_addresses() -> None:
    call_update(param=0, grad=0, count=0, states=lambda states: [0, 0])


@pytest.mark.parametrize(
    "arguments",
    [
        ([], 1, 64, 1),
        ([0], 1, 64, 1),
        ([0] * 6, 1, 64, 1),
        (None, 1, 64, 1),
    ],
    ids=str,
)
def test_traffic_that_makes_no_sense_is_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(REFUSED):
        _core.traffic(*arguments)


@pytest.mark.parametrize("written", [0, -1, 2])
def test_traffic_writes_some_of_the_streams_that_it_reads(written: int) -> None:
    stream = np.zeros(64, np.float32)
    with pytest.raises(ValueError, match="streams"):
        _core.traffic([address(stream)], written, 64, 1)
    with pytest.raises(ValueError, match="streams"):
        _core.traffic([address(stream)], 1, -64, 1)


@pytest.mark.parametrize("path", ["/nonexistent.so", "", "/etc/passwd"])
def test_a_library_that_is_not_torch_s_lends_no_threads(path: str, connection: None) -> None:
    assert _core.use_torch_threads(path) is False


@pytest.fixture
def connection() -> Any:
    """The doors into torch, as they were, after the test."""
    from flatstep import _torch

    yield
    _torch.connect()


@pytest.mark.parametrize("exchange", [object(), 1, "capsule", torch.Tensor])
def test_a_table_that_is_none_is_refused(exchange: Any, connection: None) -> None:
    with pytest.raises(REFUSED):
        _core.connect(exchange, torch.Tensor, Parameter)


# ---- the plan


class Setting:
    """A plan over two parameters with gradients, and all that it was built from."""

    def __init__(self, rule: str = "adam", flags: int = 0, size: int = COUNT) -> None:
        of = next(v for v in VARIANTS if (v.rule, v.flags) == (rule, flags))
        self.flags = [flags]
        self.hyper = [list(of.hyper().values())]
        self.params = [Parameter(torch.ones(size)) for _ in range(2)]
        for param in self.params:
            param.grad = torch.ones(size)
        self.groups: Any = [{"params": self.params}]
        self.state: Any = {
            param: {
                "step": torch.tensor(0.0),
                **{name: torch.zeros(size) for name in of.states},
            }
            for param in self.params
        }
        self.plan = _core.Plan(rule)
        self.plan.begin(self.flags)
        for param in self.params:
            self.add(param)
        self.plan.end(self.state)

    def add(self, param: Any, **changes: Any) -> None:
        step, *states = self.state[param].values()
        arguments = {
            "group": 0,
            "param": param,
            "first": 0,
            "states": states,
            "step": step,
            "first_step": True,
            "cleared": None,
        }
        self.plan.add(**arguments | changes)

    def matches(self) -> bool:
        return self.plan.matches(self.groups, self.state, self.flags)

    def step(self, **more: Any) -> Any:
        return self.plan.step(self.hyper, [1.0], 1, **more)

    def assert_untouched(self) -> None:
        for param in self.params:
            assert torch.equal(param, torch.ones_like(param))
            for state in self.state[param].values():
                assert not state.any()


@pytest.fixture
def setting() -> Setting:
    return Setting()


def test_the_setting_of_these_tests_is_right(setting: Setting) -> None:
    assert setting.matches()
    assert setting.step() is None
    assert all(param[0] < 1 for param in setting.params)
    assert all(state["step"] == 1 for state in setting.state.values())


def test_a_norm_needs_a_match_and_a_number_for_each_gradient_elsewhere(setting: Setting) -> None:
    with pytest.raises(RuntimeError, match="matches"):
        setting.plan.norm(False, [], 1)
    slots = np.zeros(2)
    with pytest.raises(RuntimeError, match="matches"):
        setting.plan.write_norms(slots.ctypes.data, [0, 1], [1, 1], False, 1)
    assert setting.matches()
    norm = setting.plan.norm(False, [], 1)
    assert setting.plan.write_norms(slots.ctypes.data, [1, 0], [1, 1], False, 1) == []
    assert slots.sum() == norm
    for places, owns in (([0], [1, 1]), ([0, 1], [1])):
        with pytest.raises(REFUSED):
            setting.plan.write_norms(slots.ctypes.data, places, owns, False, 1)
    assert norm == sum(float((param.grad**2).sum()) for param in setting.params)
    setting.plan.release()
    with pytest.raises(RuntimeError, match="matches"):
        setting.plan.norm(False, [], 1)


@pytest.mark.parametrize("extras", [[(1.0, 0.0, 0)] * 5, [(1.0,)], [(1.0, 0.0, -1)], [None]])
def test_a_step_with_extras_that_make_no_sense_updates_nothing(
    setting: Setting, extras: Any
) -> None:
    assert setting.matches()
    with pytest.raises(REFUSED):
        setting.step(extras=extras)
    setting.assert_untouched()


def test_a_step_without_a_match_updates_nothing(setting: Setting) -> None:
    with pytest.raises(RuntimeError, match="matches"):
        setting.step()
    setting.assert_untouched()


def test_a_second_step_needs_a_match_of_its_own(setting: Setting) -> None:
    """The gradients that the first one read may be gone."""
    assert setting.matches()
    setting.step()
    before = [param.detach().clone() for param in setting.params]
    for param in setting.params:
        param.grad = None
    with pytest.raises(RuntimeError, match="matches"):
        setting.step()
    assert all(torch.equal(a, b) for a, b in zip(setting.params, before, strict=True))


def test_a_step_after_a_failed_match_updates_nothing(setting: Setting) -> None:
    setting.params[1].data = torch.ones(COUNT)
    assert not setting.matches()
    with pytest.raises(RuntimeError, match="matches"):
        setting.step()
    setting.assert_untouched()


@pytest.mark.parametrize("rule", ["", "lion", None, 3])
def test_a_plan_needs_a_known_rule(rule: Any) -> None:
    with pytest.raises(REFUSED):
        _core.Plan(rule)


@pytest.mark.parametrize("flags", [[4], [2**31], [-1], None, ["x"]])
def test_a_plan_needs_known_variants(flags: Any) -> None:
    with pytest.raises(REFUSED):
        _core.Plan("adam").begin(flags)


def test_a_plan_needs_allowed_variants() -> None:
    with pytest.raises(ValueError, match="variant"):
        _core.Plan("sgd").begin([2])


class Odd:
    """Not a tensor, though it says so."""

    dtype, device, shape, grad = torch.float32, torch.device("cpu"), (COUNT,), None


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(COUNT)


NOT_MEMORY: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "number": lambda: 1.0,
    "text": lambda: "p",
    "odd": Odd,
    "array": lambda: np.ones(COUNT, np.float32),
    "meta": lambda: torch.ones(COUNT, device="meta"),
    "fake": fake,
    "sparse": lambda: torch.ones(COUNT).to_sparse(),
    "integers": lambda: torch.ones(COUNT, dtype=torch.int32),
    "freed": lambda: _freed(torch.ones(COUNT)),
}


def _freed(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


not_memory = pytest.mark.parametrize("make", NOT_MEMORY.values(), ids=NOT_MEMORY)


@not_memory
def test_a_parameter_without_memory_is_refused(make: Callable[[], Any]) -> None:
    setting = Setting()
    states = [torch.zeros(COUNT), torch.zeros(COUNT)]
    with pytest.raises(REFUSED):
        setting.plan.add(0, make(), 0, states, torch.tensor(0.0), True, None)


@not_memory
def test_a_state_without_memory_is_refused(make: Callable[[], Any], setting: Setting) -> None:
    with pytest.raises(REFUSED):
        setting.add(setting.params[0], states=[torch.zeros(COUNT), make()])


@pytest.mark.parametrize(
    "state",
    [
        torch.zeros(COUNT - 1),
        torch.zeros(COUNT, dtype=torch.float64),
        torch.zeros(COUNT, dtype=torch.bfloat16),
        torch.zeros(1).expand(COUNT),
        torch.zeros(2 * COUNT)[::2],
    ],
    ids=["short", "wide", "narrow", "expanded", "strided"],
)
def test_a_state_unlike_its_parameter_is_refused(state: Tensor, setting: Setting) -> None:
    with pytest.raises(ValueError, match="state"):
        setting.add(setting.params[0], states=[torch.zeros(COUNT), state])


def test_a_parameter_with_gaps_is_refused(setting: Setting) -> None:
    wide = torch.ones(2 * COUNT)[::2]
    states = [torch.zeros_like(wide).copy_(wide), torch.zeros(2 * COUNT)[::2]]
    with pytest.raises(ValueError, match="parameter"):
        setting.plan.add(0, wide, 0, states, None, True, None)


@pytest.mark.parametrize("states", [[], [torch.zeros(COUNT)], [torch.zeros(COUNT)] * 3, None])
def test_a_plan_needs_the_right_number_of_states(states: Any, setting: Setting) -> None:
    with pytest.raises(REFUSED):
        setting.add(setting.params[0], states=states)


@pytest.mark.parametrize(
    "step",
    [
        1,
        "one",
        torch.tensor(1),
        torch.ones(2),
        torch.tensor(1.0, device="meta"),
        torch.tensor(1.0, dtype=torch.bfloat16),
    ],
    ids=["number", "text", "integer", "two", "meta", "bfloat16"],
)
def test_a_step_that_cannot_be_counted_is_refused(step: Any, setting: Setting) -> None:
    with pytest.raises(REFUSED):
        setting.add(setting.params[0], step=step)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e300])
def test_a_step_that_is_no_count_is_refused(value: float) -> None:
    setting = Setting()
    counter = torch.tensor(value, dtype=torch.float64)
    for param in setting.params:
        setting.state[param]["step"] = counter
    setting.plan.begin([0])
    for param in setting.params:
        setting.add(param)
    setting.plan.end(setting.state)
    assert setting.matches()
    with pytest.raises(ValueError, match="step"):
        setting.step()
    assert all(torch.equal(param, torch.ones(COUNT)) for param in setting.params)


@pytest.mark.parametrize("group", [-1, 1, 2**31 - 1])
def test_a_plan_needs_a_known_group(group: int, setting: Setting) -> None:
    with pytest.raises(REFUSED):
        setting.add(setting.params[0], group=group)
    with pytest.raises(REFUSED):
        setting.plan.add_other(group, setting.params[0], True)


@pytest.mark.parametrize(
    ("hyper", "scales"),
    [
        ([], []),
        ([[0.1] * 5], []),
        ([], [1.0]),
        ([[0.1] * 4], [1.0]),
        ([[0.1] * 6], [1.0]),
        ([[0.1] * 5] * 2, [1.0] * 2),
        ([["lr"] * 5], [1.0]),
        (None, None),
    ],
    ids=str,
)
def test_a_step_needs_numbers_for_each_group(hyper: Any, scales: Any, setting: Setting) -> None:
    assert setting.matches()
    with pytest.raises(REFUSED):
        setting.plan.step(hyper, scales, 1)
    setting.assert_untouched()


GARBAGE: dict[str, Callable[[Setting], tuple[Any, Any, Any]]] = {
    "no groups": lambda s: ([], s.state, s.flags),
    "groups of none": lambda s: ([None], s.state, s.flags),
    "groups of lists": lambda s: ([[s.params]], s.state, s.flags),
    "no params": lambda s: ([{}], s.state, s.flags),
    "params in a tuple": lambda s: ([{"params": tuple(s.params)}], s.state, s.flags),
    "params that are none": lambda s: ([{"params": [None, None]}], s.state, s.flags),
    "one param": lambda s: ([{"params": s.params[:1]}], s.state, s.flags),
    "three params": lambda s: ([{"params": [*s.params, s.params[0]]}], s.state, s.flags),
    "the other order": lambda s: ([{"params": s.params[::-1]}], s.state, s.flags),
    "two groups": lambda s: (s.groups * 2, s.state, s.flags),
    "two variants": lambda s: (s.groups, s.state, s.flags * 2),
    "another variant": lambda s: (s.groups, s.state, [1]),
    "groups that are none": lambda s: (None, s.state, s.flags),
    "state that is none": lambda s: (s.groups, None, s.flags),
    "state in a list": lambda s: (s.groups, [], s.flags),
    "no state": lambda s: (s.groups, {}, s.flags),
    "state of none": lambda s: (s.groups, dict.fromkeys(s.params), s.flags),
    "state of lists": lambda s: (s.groups, {p: [] for p in s.params}, s.flags),
    "empty state": lambda s: (s.groups, {p: {} for p in s.params}, s.flags),
    "a copy of the state": lambda s: (s.groups, {p: dict(x) for p, x in s.state.items()}, s.flags),
    "more state": lambda s: (s.groups, s.state | {"x": {}}, s.flags),
    "flags that are none": lambda s: (s.groups, s.state, None),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_a_plan_matches_only_what_it_was_made_of(
    garbage: Callable[[Setting], tuple[Any, Any, Any]], setting: Setting
) -> None:
    try:
        matched = setting.plan.matches(*garbage(setting))
    except REFUSED:
        matched = False
    assert matched is False
    setting.assert_untouched()


def _other_dtype(s: Setting) -> None:
    s.params[1].data = torch.ones(COUNT, dtype=torch.float64)


MOVED: dict[str, Callable[[Setting], object]] = {
    "other memory": lambda s: s.params[1].set_(torch.ones(COUNT)),
    "other dtype": _other_dtype,
    "other shape": lambda s: s.params[1].unsqueeze_(0),
    "freed memory": lambda s: s.params[1].data.untyped_storage().resize_(0),
    "freed gradient": lambda s: s.params[1].grad.untyped_storage().resize_(0),
    "shorter state": lambda s: s.state[s.params[1]]["exp_avg"].resize_(COUNT - 1),
    "freed state": lambda s: s.state[s.params[1]]["exp_avg"].untyped_storage().resize_(0),
    "other state": lambda s: s.state[s.params[1]].update(exp_avg=torch.zeros(COUNT)),
    "state in other memory": lambda s: s.state[s.params[1]]["exp_avg"].set_(torch.zeros(COUNT)),
    "other step": lambda s: s.state[s.params[1]].update(step=torch.tensor(0.0)),
    "step in other memory": lambda s: s.state[s.params[1]]["step"].set_(torch.tensor(0.0)),
    "state gone": lambda s: s.state[s.params[1]].pop("exp_avg"),
    "all state gone": lambda s: s.state.clear(),
    "transposed gradient": lambda s: s.params[1].grad.set_(torch.ones(2 * COUNT)[::2]),
}


@pytest.mark.parametrize("move", MOVED.values(), ids=MOVED)
def test_a_plan_notices_what_has_moved(move: Callable[[Setting], object], setting: Setting) -> None:
    assert setting.matches()
    with torch.no_grad():
        move(setting)
    assert not setting.matches()


def test_a_plan_outlives_its_parameters() -> None:
    setting = Setting()
    assert setting.matches()
    plan, flags, hyper = setting.plan, setting.flags, setting.hyper
    state = setting.state
    del setting
    params = [Parameter(torch.ones(COUNT)) for _ in range(2)]
    assert not plan.matches([{"params": params}], state, flags)
    with pytest.raises(RuntimeError, match="matches"):
        plan.step(hyper, [1.0], 1)
    with pytest.raises(RuntimeError, match="matches"):
        plan.updated()
    plan.begin(flags)
    assert plan.segments == 0
