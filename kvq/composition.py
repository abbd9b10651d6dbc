"""The composition root: where the runtime is given the policies that the controller implements.

Everything below takes what it needs as an argument; only this module knows both sides.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from kvq.controller.policies import make_policy
from kvq.runtime.bundle.bundle import Bundle
from kvq.runtime.catalog.references import default_model, locate
from kvq.runtime.chat.conversation import Conversation
from kvq.runtime.errors import BundleError
from kvq.runtime.keywords import named_keywords
from kvq.runtime.session.model import Model


def open_bundle(path: str | os.PathLike[str], threads: int | None = None) -> Model:
    """The model of a bundle's folder, and of nothing else.

    Args:
        path: the folder.
        threads: as in `load`.

    Raises:
        BundleError: no such bundle, or it is damaged, unsafe or of another version.
        BackendError: another number of threads is already in force.
    """
    return Model(Bundle(os.fspath(path)), make_policy, threads, Conversation)


@named_keywords()
def load(
    path_or_name: str | os.PathLike[str] | None = None,
    *,
    threads: int | None = None,
    offline: bool | None = None,
    notice: Callable[[str], None] | None = None,
) -> Model:
    """Load a model.

    Args:
        path_or_name: a name (`kvq list`), a bundle folder, a checkpoint folder or GGUF file, or a hub id
            ("owner/name") of a bundle or of a checkpoint. What has to be fetched or exported is so once, and kept in
            KVQ_HOME. None is the model that `kvq use` chose, else the embedded one.
        threads: onnxruntime threads; None uses every available core. One number per process.
        offline: fetch nothing; None does as HF_HUB_OFFLINE says.
        notice: told in one line each what takes time while a model is fetched, and what sessions want their user to
            know.

    Raises:
        BundleError: no such bundle, or it is damaged, unsafe or of another version.
        HubError: a model that is not on this machine and cannot be fetched (a `BundleError`).
        CheckpointError: the checkpoint cannot be exported.
        BackendError: another number of threads is already in force.

    onnxruntime sessions of your own in the same process need `kvq.session_options()`: kvq runs on
    onnxruntime's global thread pool, and with one it refuses sessions that bring their own.
    """
    if not isinstance(path_or_name, str | os.PathLike | None):
        raise BundleError(f"a model is named by text or a path, got {path_or_name!r:.60}")
    reference, hint = default_model() if path_or_name is None else (os.fspath(path_or_name), "")
    if hint and notice:
        notice(hint)
    model = open_bundle(locate(reference, offline=offline, notice=notice), threads)
    model.notice = notice
    return model
