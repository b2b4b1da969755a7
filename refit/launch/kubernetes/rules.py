"""The rules of Kubernetes for names, labels, quantities and variables, each checked before anything is sent."""

from __future__ import annotations

import re

from refit.errors import UsageError

MAX_LABEL = 63
"""Most characters of a DNS label (RFC 1035), and of a label's value."""

MAX_SUBDOMAIN = 253

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_QUANTITY = re.compile(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][+-]?[0-9]+)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def name_of(text: str) -> str:
    """`text` as Kubernetes writes names: small letters and digits, `-` for anything else, and a letter first."""
    name = re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")
    return name if name[:1].isalpha() else f"r{name}"


def check_job_name(name: str, suffix: str, kind: str) -> None:
    """Raise UsageError unless `name`, with the suffix that `kind` gives its longest pod name, is a DNS label."""
    most = MAX_LABEL - len(suffix)
    if len(name) > most:
        raise UsageError(
            f"name {name!r} has {len(name)} characters, {most} are the most for a {kind} (a DNS label has {MAX_LABEL}, "
            f"and its pods end in {suffix!r}): shorten the scenario's name or give a shorter --run-id"
        )
    check_label(name, "name")


def check_label(text: str, where: str) -> None:
    """Raise UsageError unless `text` is a DNS label."""
    if len(text) > MAX_LABEL or not _LABEL.fullmatch(text):
        raise UsageError(
            f"{where} {text[:80]!r} is no DNS label: use at most {MAX_LABEL} small letters, digits and -, the first a "
            "letter, the last no -"
        )


def check_subdomain(text: str, where: str) -> None:
    """Raise UsageError unless `text` can name an object."""
    if len(text) > MAX_SUBDOMAIN or not _SUBDOMAIN.fullmatch(text):
        raise UsageError(
            f"{where} {text[:80]!r} is no name of an object: use at most {MAX_SUBDOMAIN} small letters, digits, - and "
            "., letters or digits at both ends"
        )


def check_label_value(text: str, where: str) -> None:
    """Raise UsageError unless `text` can be the value of a label."""
    if len(text) > MAX_LABEL or not _LABEL_VALUE.fullmatch(text):
        raise UsageError(
            f"{where} {text[:80]!r} is no value of a label: use at most {MAX_LABEL} letters, digits, -, _ and ., "
            "letters or digits at both ends"
        )


def check_key(text: str, where: str) -> None:
    """Raise UsageError unless `text` is a key of labels or resources: `name`, or `domain/name`."""
    domain, slash, name = text.rpartition("/")
    if (
        not name
        or len(name) > MAX_LABEL
        or not _LABEL_VALUE.fullmatch(name)
        or (slash and not _SUBDOMAIN.fullmatch(domain))
    ):
        raise UsageError(f"{where} {text[:80]!r} is no key: use NAME or DOMAIN/NAME, as nvidia.com/gpu")


def check_quantity(text: str, where: str) -> None:
    """Raise UsageError unless `text` is a quantity."""
    if not _QUANTITY.fullmatch(text):
        raise UsageError(f"{where} {text[:80]!r} is no quantity: give a number with m, k, M, G, Ki, Mi, Gi or nothing")


def check_variable(name: str, value: str, where: str) -> None:
    """Raise UsageError unless `name` can be an environment variable that this suite does not set itself."""
    if not _VARIABLE.fullmatch(name):
        raise UsageError(f"{where} {name[:80]!r} is no variable: use letters, digits and _, the first no digit")
    if name.startswith("PET_") or name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "REFIT_HOST"):
        raise UsageError(f"{where} {name} cannot be set: the operator or torchrun sets it for each pod: leave it out")
    if "\x00" in value:
        raise UsageError(f"{where} {name} holds a null character: remove it")


def check_path(text: str, where: str) -> None:
    """Raise UsageError unless `text` is an absolute path that a volume can be mounted at."""
    if not text.startswith("/") or ":" in text or text == "/":
        raise UsageError(f"{where} {text[:80]!r} is no place for a volume: give an absolute path without colons")
