"""ModProp, a causal low-complexity alternative to back-propagation through time, in hand-written Cython kernels."""

try:
    from . import core
except ImportError as error:
    raise ImportError(
        f"modprop_fast: the compiled engine is missing ({error}); in a clone, `pip install -e .` builds it"
    ) from error

from .learner import Evaluation, Learner
from .network import Network
from .optimizers import SGD, Adam, StepDecay
from .rules import BPTT, MDGL, RFLO, RTRL, RULES, TBPTT, UORO, EProp, LowRank, ModProp, Rule, SnAp1, parse_rule

__version__ = "0.1.0"
__all__ = [
    "BPTT",
    "MDGL",
    "RFLO",
    "RTRL",
    "RULES",
    "SGD",
    "TBPTT",
    "UORO",
    "Adam",
    "EProp",
    "Evaluation",
    "Learner",
    "LowRank",
    "ModProp",
    "Network",
    "Rule",
    "SnAp1",
    "StepDecay",
    "__version__",
    "core",
    "parse_rule",
]
