"""kvq: an on-device LLM runtime whose KV cache keeps every token at its own precision.

import kvq

model = kvq.load()
session = model.session(policy="mixed")
for response in session.generate("Once upon a time", max_tokens=40):
    print(response.text, end="", flush=True)
print(session.stats())
"""

from __future__ import annotations

import importlib
import os

TYPE_CHECKING = False  # what type checkers take for true; typing and pathlib would be most of what `import kvq` costs
if TYPE_CHECKING:
    from typing import Any

    from kvq.composition import load
    from kvq.controller.policies import POLICIES, Policy, ScoredPolicy, TokenFeatures, make_policy
    from kvq.runtime.chat.conversation import Conversation
    from kvq.runtime.errors import (
        BackendError,
        BatchError,
        BudgetError,
        BundleError,
        CalibrationError,
        ChatTemplateError,
        CheckpointError,
        ContextError,
        GrammarError,
        HubError,
        KvqError,
        MemoryShortageError,
        NonFiniteError,
        OptionError,
        PolicyError,
        PromptError,
        RequestError,
        SamplingError,
        ServerError,
        SessionError,
        TokenizerError,
        UnsupportedArchitectureError,
    )
    from kvq.runtime.inspect.inspection import InspectedToken, Inspection, inspect_session, inspect_text
    from kvq.runtime.machine.threads import session_options
    from kvq.runtime.session.asynchronous import aiterate
    from kvq.runtime.session.generation import Response
    from kvq.runtime.session.model import Model
    from kvq.runtime.session.session import Session, kv_nbytes
    from kvq.runtime.session.several import Completion
    from kvq.runtime.session.statistics import Stats
    from kvq.runtime.text.template import ChatTemplate

# In a checkout the sub-packages stand beside this folder rather than inside it; Python started
# there finds this folder before the installed package.
_checkout = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if os.path.isfile(os.path.join(_checkout, "pyproject.toml")):
    __path__.append(_checkout)

import kvq.runtime.version  # noqa: E402 # found only now
from kvq.runtime.machine import telemetry as _telemetry  # noqa: E402

_telemetry.refuse()  # here, since nothing of kvq imports onnxruntime before this

__version__ = kvq.runtime.version.VERSION

# Public name -> module. Resolved on first use: `import kvq` itself costs next to nothing.
_EXPORTS = {
    "load": "kvq.composition",
    "Model": "kvq.runtime.session.model",
    **dict.fromkeys(
        ["InspectedToken", "Inspection", "inspect_session", "inspect_text"], "kvq.runtime.inspect.inspection"
    ),
    **dict.fromkeys(["Session", "kv_nbytes"], "kvq.runtime.session.session"),
    "ChatTemplate": "kvq.runtime.text.template",
    "Conversation": "kvq.runtime.chat.conversation",
    "Completion": "kvq.runtime.session.several",
    "aiterate": "kvq.runtime.session.asynchronous",
    "Response": "kvq.runtime.session.generation",
    "Stats": "kvq.runtime.session.statistics",
    "session_options": "kvq.runtime.machine.threads",
    **dict.fromkeys(["POLICIES", "Policy", "ScoredPolicy", "TokenFeatures", "make_policy"], "kvq.controller.policies"),
    **dict.fromkeys(
        [
            "BackendError",
            "BatchError",
            "BudgetError",
            "BundleError",
            "CalibrationError",
            "ChatTemplateError",
            "CheckpointError",
            "ContextError",
            "GrammarError",
            "HubError",
            "KvqError",
            "MemoryShortageError",
            "NonFiniteError",
            "OptionError",
            "PolicyError",
            "PromptError",
            "RequestError",
            "SamplingError",
            "ServerError",
            "SessionError",
            "TokenizerError",
            "UnsupportedArchitectureError",
        ],
        "kvq.runtime.errors",
    ),
}

__all__ = [
    "POLICIES",
    "BackendError",
    "BatchError",
    "BudgetError",
    "BundleError",
    "CalibrationError",
    "ChatTemplate",
    "ChatTemplateError",
    "CheckpointError",
    "Completion",
    "ContextError",
    "Conversation",
    "GrammarError",
    "HubError",
    "InspectedToken",
    "Inspection",
    "KvqError",
    "MemoryShortageError",
    "Model",
    "NonFiniteError",
    "OptionError",
    "Policy",
    "PolicyError",
    "PromptError",
    "RequestError",
    "Response",
    "SamplingError",
    "ScoredPolicy",
    "ServerError",
    "Session",
    "SessionError",
    "Stats",
    "TokenFeatures",
    "TokenizerError",
    "UnsupportedArchitectureError",
    "aiterate",
    "inspect_session",
    "inspect_text",
    "kv_nbytes",
    "load",
    "make_policy",
    "session_options",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'kvq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
