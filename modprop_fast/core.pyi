from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray
from typing_extensions import disjoint_base

from .network import Network
from .rules import Plan

_Floats: TypeAlias = NDArray[np.floating[Any]]  # of the network's dtype

MAX_TOGETHER: int
MAX_WINDOW: int

def compiler() -> str: ...
def available_isas() -> tuple[str, ...]: ...
def isa() -> str: ...
def describe(value: object) -> str: ...
def aligned(shapes: Mapping[str, tuple[int, ...]], dtype: DTypeLike) -> dict[str, NDArray[Any]]: ...

def run_trials(
    engines: list[Engine],
    trials: list[tuple[_Floats, _Floats | None, NDArray[np.int64] | None, NDArray[np.uint8] | None, float]],
    learn: bool,
    ys: list[_Floats] | None = None,
    *,
    alone: bool = False,
) -> None: ...

@disjoint_base
class Engine:
    GRADIENT: ClassVar[tuple[str, str, str]]
    def __init__(
        self,
        network: Network,
        plan: Plan,
        loss: Literal["mse", "cross_entropy"],
        feedback: _Floats | None = None,
        *,
        online: bool = False,
        lr: float = 0.0,
        on_unstable: Callable[[], object] | None = None,
    ) -> None: ...
    @property
    def arrays(self) -> dict[str, _Floats]: ...
    @property
    def y(self) -> _Floats: ...
    @property
    def means(self) -> NDArray[np.float64] | None: ...
    @means.setter
    def means(self, values: NDArray[np.float64] | None) -> None: ...
    @property
    def updates(self) -> int: ...
    @updates.setter
    def updates(self, count: int) -> None: ...
    @property
    def loss(self) -> float: ...
    def refresh(self) -> None: ...
    def reset(self) -> None: ...
    def settle(self) -> None: ...
    def forget_ahead(self) -> None: ...
    def clear(self) -> None: ...
    def must_stream(self, call: str) -> None: ...
    def step(
        self,
        x: _Floats,
        target: _Floats | SupportsIndex | None = None,
        signal: _Floats | None = None,
        learn: bool = True,
    ) -> _Floats: ...
    def run(
        self,
        xs: _Floats,
        target: _Floats | None,
        label: NDArray[np.int64] | None,
        mask: NDArray[np.uint8] | None,
        learn: bool,
        ys: _Floats | None = None,
        chunk: int = 0,
    ) -> float: ...
    @property
    def window(self) -> int: ...
    @window.setter
    def window(self, window: int) -> None: ...
    def adjoint(
        self,
        xs: _Floats,
        target: _Floats | None,
        label: NDArray[np.int64] | None,
        mask: NDArray[np.uint8] | None,
        scale: float,
    ) -> None: ...
