"""What a profile found, in plain values that JSON holds and gives back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from flatstep.profiling.measure import Timing

INTERRUPTED = 130  # an exit code
LEAVES: dict[Any, tuple[type, ...]] = {float: (float, int), int: (int,), str: (str,)}


@dataclass
class Limit:
    """The time of an update's memory traffic alone.

    Attributes:
        pages: The pages that parameters, gradients and states were wanted on; None on a GPU.
        granted: Whether the system gave them.
        timing: Seconds for as many bytes as the update moves.
        gb_per_s: The bytes that the rule counts, read and written, in 1e9 a second.
    """

    pages: str | None
    granted: bool
    timing: Timing
    gb_per_s: float


@dataclass
class Result:
    """One implementation on one workload.

    Attributes:
        implementation: Such as "flatstep flat" or "torch fused".
        problem: Why there is no time: the result was wrong, or the step failed.
        pages: The pages that parameters, gradients and states lie on; None on a GPU.
        first_step: Seconds of the step that creates the states.
        timing: Seconds of a later step.
        ns_per_parameter: Nanoseconds of a step for each parameter.
        gb_per_s: The bytes that the rule counts, read and written, in 1e9 a second.
        of_limit: The limit's time on the same kind of pages, divided by this one's.
        to_torch: This time divided by that of torch's fastest path with a right result.
        most_bytes: Bytes that the first steps took at most, beyond parameters and gradients: states
            and temporaries. None where they cannot be told.
    """

    implementation: str
    problem: str | None = None
    pages: str | None = None
    first_step: float | None = None
    timing: Timing | None = None
    ns_per_parameter: float | None = None
    gb_per_s: float | None = None
    of_limit: float | None = None
    to_torch: float | None = None
    most_bytes: int | None = None

    @property
    def ours(self) -> bool:
        """Whether it is flatstep's, and not an optimizer that was named with ``--against``."""
        return self.implementation.partition(" ")[0] == "flatstep"

    @property
    def of_torch(self) -> bool:
        """Whether it is one of torch's paths, and not an optimizer that was named."""
        return self.implementation.partition(" ")[0] == "torch"


@dataclass(kw_only=True)
class Measured:
    """A race against the machine's limit.

    Attributes:
        parameters: How many elements all tensors have together.
        bytes_moved: Bytes that a call reads and writes, as flatstep does it.
        refused: Why nothing was measured.
        limits: The machine's limit on each kind of pages.
        results: Of each implementation.
    """

    parameters: int
    bytes_moved: int
    refused: str | None = None
    limits: list[Limit] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)

    @property
    def bytes_per_parameter(self) -> float:
        """What flatstep reads and writes for each parameter."""
        return self.bytes_moved / self.parameters

    @property
    def is_timed(self) -> bool:
        """Whether there is at least one time."""
        return any(result.timing is not None for result in self.results)

    @property
    def says_something(self) -> bool:
        """Whether there is a time, a refusal or a problem."""
        problems = any(result.problem is not None for result in self.results)
        return self.is_timed or self.refused is not None or problems

    def rate(self, timing: Timing) -> float:
        """The bytes moved, in 1e9 a second."""
        return self.bytes_moved / timing.median / 1e9

    def result(self, implementation: str) -> Result | None:
        """The result of one implementation, if it is there."""
        return next((r for r in self.results if r.implementation == implementation), None)

    def torch_best(self) -> Result | None:
        """The fastest path of torch with a right result."""
        timed = [r for r in self.results if r.of_torch and r.timing is not None]
        return min(timed, key=lambda r: r.timing.median if r.timing else 0.0, default=None)

    def best_limit(self) -> Limit | None:
        """The limit on the fastest kind of pages."""
        return min(self.limits, key=lambda limit: limit.timing.median, default=None)

    def compare(self) -> None:
        """Fills in what follows from the times, once they are all there."""
        best = self.torch_best()
        for result in self.results:
            if result.timing is not None and best is not None and best.timing is not None:
                result.to_torch = result.timing.median / best.timing.median


@dataclass(kw_only=True)
class Bucket(Measured):
    """An optimizer over only those tensors of a workload whose sizes are of one power of ten.

    They lie in memory of their own, as if a model had no others.

    Attributes:
        smallest: Elements of the smallest tensor.
        largest: Elements of the largest tensor.
        tensors: How many there are.
    """

    smallest: int
    largest: int
    tensors: int


@dataclass(kw_only=True)
class Point(Measured):
    """One place of a sweep.

    Attributes:
        x: How many parameters, threads or tensors there are.
    """

    x: int


@dataclass
class Sweep:
    """The same update at growing sizes, threads or numbers of tensors.

    Attributes:
        axis: What grows: "parameters", "threads" or "tensors".
        title: What is measured, in words.
        optimizer: The optimizer's name.
        dtype: Of parameters, gradients and states.
        points: In growing order.
    """

    axis: str
    title: str
    optimizer: str
    dtype: str
    points: list[Point] = field(default_factory=list)

    def __str__(self) -> str:
        return f"sweep of {self.axis}, {self.optimizer}, {self.dtype}"


@dataclass
class Overhead:
    """What a step and a tensor cost, from a line through the times of a sweep of tensors.

    Attributes:
        implementation: Whose, such as "flatstep", or "limit".
        optimizer: The optimizer's name.
        per_step: Seconds that a step costs however many tensors there are: the intercept.
        per_tensor: Seconds that each tensor adds, with its few elements: the slope.
        spread: How far the times lie from the line, as a share of them: a root of mean squares.
    """

    implementation: str
    optimizer: str
    per_step: float
    per_tensor: float
    spread: float


@dataclass(kw_only=True)
class Case(Measured):
    """One workload under one optimizer.

    Attributes:
        workload: Its name.
        title: What the workload is, in words.
        optimizer: The optimizer's name.
        dtype: Of parameters, gradients and states.
        tensors: How many there are.
        states: How many states the rule keeps for each parameter.
        buckets: The same over the tensors of each size alone, where that was asked for.
    """

    workload: str
    title: str
    optimizer: str
    dtype: str
    tensors: int
    states: int
    buckets: list[Bucket] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.workload} × {self.optimizer}, {self.dtype}"


@dataclass(kw_only=True)
class Pass(Measured):
    """An option of a step, beside the sequence of torch calls that it replaces.

    Attributes:
        name: As it is chosen.
        title: What is done, in words.
        calls: torch's calls, in words.
        workload: The workload's name.
        parts: torch's calls, each alone, where that is measured; "implementation" names the call.
    """

    name: str
    title: str
    calls: str
    workload: str
    parts: list[Result] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.workload}, pass {self.name}"


@dataclass
class TrainingResult:
    """Backward, step and zero_grad on a real model, in one way.

    Attributes:
        way: Such as "torch fused" or "flatstep, FlatBuffer".
        problem: Why there is no time.
        backward: Seconds of the backward pass.
        step: Seconds of the optimizer's step.
        zero_grad: Seconds of clearing the gradients.
        total: Seconds of the three together.
        to_torch: The total divided by torch's.
        forward: Seconds of the forward pass, which is not part of the total.
    """

    way: str
    problem: str | None = None
    backward: Timing | None = None
    step: Timing | None = None
    zero_grad: Timing | None = None
    total: Timing | None = None
    to_torch: float | None = None
    forward: Timing | None = None

    @property
    def ours(self) -> bool:
        """Whether it is flatstep's."""
        return self.way.startswith("flatstep")


@dataclass
class Training:
    """Backward, step and zero_grad on a real model, in every way."""

    model: str
    parameters: int
    optimizer: str
    results: list[TrainingResult] = field(default_factory=list)


@dataclass
class Machine:
    """What the figures belong to: the host, and the GPU where they are a GPU's.

    Attributes:
        cpu: The host's processor.
        cores: How many it has.
        threads: Those of an update on the host.
        isa: The instruction set of an update on the host.
        flatstep: Its version.
        torch: Its version.
        system: The host's.
        device: Where updates were measured, "cpu" or "cuda".
        gpu: The GPU's name.
        cuda: The version of CUDA that torch was built with.
    """

    cpu: str
    cores: int
    threads: int
    isa: str
    flatstep: str
    torch: str
    system: str
    device: str = "cpu"
    gpu: str | None = None
    cuda: str | None = None


@dataclass
class Report:
    """Everything that a profile found.

    Attributes:
        machine: What the figures belong to.
        cases: In the order in which they were measured.
        passes: The options of a step, beside the torch calls that they replace.
        training: The whole step, where it was measured.
        sweeps: The same update at growing sizes, threads or numbers of tensors.
        overheads: What a step and a tensor cost, from the sweeps of tensors.
        left_out: What is measured on another device only, and why.
        warnings: What makes the figures doubtful.
        seconds: How long it took.
        interrupted: Whether it was broken off.
    """

    machine: Machine
    cases: list[Case] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    training: Training | None = None
    sweeps: list[Sweep] = field(default_factory=list)
    overheads: list[Overhead] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def measured(self) -> list[Case]:
        """The cases that have at least one time."""
        return [case for case in self.cases if case.is_timed]

    @property
    def measured_passes(self) -> list[Pass]:
        """The passes that have at least one time."""
        return [each for each in self.passes if each.is_timed]

    @property
    def measured_sweeps(self) -> list[Sweep]:
        """The sweeps that have at least one time."""
        return [sweep for sweep in self.sweeps if any(point.is_timed for point in sweep.points)]

    def overheads_of(self, sweep: Sweep) -> list[Overhead]:
        """What a step and a tensor cost by a sweep; only one of tensors tells."""
        if sweep.axis != "tensors":
            return []
        return [overhead for overhead in self.overheads if overhead.optimizer == sweep.optimizer]

    def races(self) -> Iterator[tuple[str, Measured]]:
        """Everything that was raced, and what it is called."""
        for case in self.cases:
            yield str(case), case
            for bucket in case.buckets:
                yield f"{case}, tensors of {bucket.smallest:,} to {bucket.largest:,}", bucket
        for each in self.passes:
            yield str(each), each
        for sweep in self.sweeps:
            for point in sweep.points:
                yield f"{sweep}, {point.x:,}", point

    @property
    def problems(self) -> dict[str, str]:
        """Why there is no time, by where and whose, of all that went wrong."""
        found = {
            f"{name}, {result.implementation}": result.problem
            for name, measured in self.races()
            for result in measured.results
            if result.problem is not None
        }
        for result in self.training.results if self.training else []:
            if result.problem is not None:
                found[f"whole step, {result.way}"] = result.problem
        return found

    @property
    def failed(self) -> bool:
        """Whether something of flatstep's went wrong."""
        ours = [r.problem for _, measured in self.races() for r in measured.results if r.ours]
        ours += [r.problem for r in (self.training.results if self.training else []) if r.ours]
        return any(problem is not None for problem in ours)

    @property
    def exit_code(self) -> int:
        """The command's own, 0 where there are figures, and flatstep's results are right."""
        if self.failed:
            return 1
        if self.interrupted:
            return INTERRUPTED
        figures = self.measured or self.measured_passes or self.measured_sweeps or self.training
        return 0 if figures else 2

    def as_dict(self) -> dict[str, Any]:
        """The report in dictionaries, lists, strings and numbers."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Report:
        """The report whose :meth:`as_dict` this is, of this version or an earlier one.

        Raises:
            ValueError: It is something else.
        """
        try:
            report: Report = _restored(Report, values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"these are not the figures of a profile: {error}") from error
        return report


def _restored(kind: Any, value: Any) -> Any:
    """A value of a type that is a dataclass, a list or optional, from what JSON makes of it."""
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        known = [f.name for f in fields(kind) if f.name in value]
        return kind(**{name: _restored(hints[name], value[name]) for name in known})
    arguments = get_args(kind)
    if get_origin(kind) is list:
        return [_restored(arguments[0], item) for item in value]
    if arguments and value is not None:
        return _restored(arguments[0], value)
    if kind in LEAVES and not isinstance(value, LEAVES[kind]):
        raise TypeError(f"{value!r} stands where a {kind.__name__} should")
    return value
