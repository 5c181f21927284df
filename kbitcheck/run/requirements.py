"""An implementation that is not installed here: ``REQUIREMENT::module:function``, or a release by its name alone."""

import hashlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kbitcheck.core.errors import UsageError

SEPARATOR = "::"
PARENT = "zzz_kbitcheck.pth"  # the last of its directory's; every environment has it
# What a release is asked for where nothing else is named, beside those of trainers.
FUNCTIONS = {"peft": "peft:prepare_model_for_kbit_training"}
NAME = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^\]]*\])?\s*")
PINNED = re.compile(NAME.pattern + r"([=~<>!]=?=?|@)\s*\S.*")
GIT = re.compile(r"git\+(?P<url>[^#]+?)(@(?P<ref>[^@/#]+(/[^@#]+)?))?(#.*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
NOT_SOURCE = frozenset({"__pycache__", "build", "dist", "node_modules", "venv"})


@dataclass(frozen=True, slots=True)
class Requirement:
    """What pip is to install, as the user wrote it, and which function of it prepares (``module:function``).

    ``beside`` is all that is installed with it, where its own requirements do not go with this torch or ask for much that a
    preparation never imports; ``stand_ins`` are modules that are empty in its environment.
    """

    text: str
    function: str
    beside: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = ()

    @property
    def project(self) -> str:
        """The normalized name of the project; empty for a path or an address."""
        named = PINNED.fullmatch(self.text) or NAME.fullmatch(self.text)
        return re.sub(r"[-_.]+", "-", named[1]).lower() if named and not self.path else ""

    @property
    def path(self) -> Path | None:
        """The local directory or file that is to be installed, if it is one."""
        archive = self.text.endswith((".whl", ".tar.gz", ".zip"))
        if "://" in self.text or not (archive or ("/" in self.text and not PINNED.fullmatch(self.text))):
            return None
        return Path(self.text).expanduser().resolve()

    @property
    def pip(self) -> str:
        """The word for pip's command line."""
        return str(self.path or self.text)

    def validate(self) -> None:
        """Check what can be checked without a network."""
        if self.path is not None and not self.path.exists():
            raise UsageError(f"requirement {self.text!r}: no such file or directory: {self.path}")
        if self.path is None and not self.project and "://" not in self.text:
            raise UsageError(
                f"{self.text!r} is no requirement: write peft==0.13.2, git+https://..., a directory or a wheel"
            )

    def content(self) -> str:
        """The version of a requirement that can change under its name: a branch's commit, a digest of a path's files; or ""."""
        if self.path is not None:
            return _digest(self.path)
        address = self.text.partition("@")[2].strip() if self.project and "@" in self.text else self.text
        git = GIT.fullmatch(address)
        return "" if git is None else _commit(git["url"], git["ref"] or "HEAD")


def _trainer(name: str, requirement: str, *beside: str, stand_ins: tuple[str, ...] = ()) -> Requirement:
    function = f"kbitcheck.integrations.trainers.{name}:prepare_model_for_kbit_training"
    return Requirement(requirement, function, beside, stand_ins)


DATASETS = (
    "pandas",
    "python-dateutil",
    "six",
    "pyarrow",
    "xxhash",
    "aiohttp",
    "aiosignal",
    "aiohappyeyeballs",
    "frozenlist",
    "multidict",
    "propcache",
    "yarl",
)
HUB = ("huggingface_hub<2", "httpx", "httpcore")
# What each trainer does to a model before training, at the release that was last run.
TRAINERS = {
    "trl": _trainer("trl", "trl==1.16.0"),
    "llamafactory": _trainer(
        "llamafactory", "llamafactory==0.9.5", "transformers==5.6.0", "peft==0.18.1", "trl==0.24.0", "accelerate==1.11.0",
        "datasets==4.0.0", "tokenizers==0.22.2", "fsspec<=2025.3.0", "dill<0.3.9", "multiprocess<0.70.17", "omegaconf",
        "pillow<11", "scipy", "sentencepiece", "pytz", *HUB, *DATASETS,
        stand_ins=("torchaudio",),
    ),
    "axolotl": _trainer(
        "axolotl", "axolotl==0.19.0", "transformers==5.16.1", "peft==0.20.0", "trl==1.9.0", "accelerate==1.13.0",
        "datasets==4.8.4", "tokenizers==0.23.1", "fsspec<=2026.2.0", "dill", "multiprocess", "addict", "axolotl-contribs-lgpl==0.0.7",
        "axolotl-contribs-mit==0.0.6", "fastcore", "posthog==6.7.11", "backoff", "distro", "kernels<0.17", "kernels-data",
        "nvidia-ml-py", "pytz", "scipy", "sentencepiece", "triton", "zstandard", *HUB, *DATASETS,
    ),
    "swift": _trainer(
        "swift", "ms-swift==4.6.0", "transformers==5.19.0", "peft==0.20.0", "trl<1.0", "datasets==4.8.4", "dill<0.4.2",
        "multiprocess<0.70.20", "modelscope", "modelscope-hub", "einops", "json_repair", "simplejson", "scipy",
        "sentencepiece", "cloudpickle", "cffi", "cryptography", "sniffio", "zstandard", "httpx", "httpcore", *DATASETS,
    ),
}  # fmt: skip


def parse(text: str) -> Requirement | None:
    """The requirement that an implementation's name begins with; None where it names what is installed here."""
    if text in TRAINERS:
        return TRAINERS[text]
    package, separator, function = text.rpartition(SEPARATOR)
    if separator:
        if not package.strip():
            raise UsageError(f"implementation {text!r} names nothing to install before {SEPARATOR}")
        return Requirement(package.strip(), function.strip())
    if not PINNED.fullmatch(text) and not text.startswith("git+"):
        return None
    release = Requirement(text.strip(), "")
    for trainer in TRAINERS.values():
        if trainer.text == release.text:
            return trainer
        if trainer.project == release.project and not trainer.beside:  # what is beside one release fits no other
            return Requirement(release.text, trainer.function)
    if release.project not in FUNCTIONS:
        raise UsageError(f"implementation {text!r} names no function: write {text}{SEPARATOR}module:function")
    return Requirement(release.text, FUNCTIONS[release.project])


def _digest(path: Path) -> str:
    """A digest of the name and bytes of a file, or of all source files in a directory."""
    total = hashlib.blake2b(digest_size=16)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _source(p, path))
    for file in files:
        content = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
        total.update(f"{file.relative_to(path)} {content}\n".encode())
    return total.hexdigest()


def _source(file: Path, root: Path) -> bool:
    parts = file.relative_to(root).parts
    return not any(part in NOT_SOURCE or part.startswith(".") or part.endswith(".egg-info") for part in parts)


def _commit(url: str, ref: str) -> str:
    """The commit of a branch or tag in a repository; the name itself where the repository does not answer."""
    if COMMIT.fullmatch(ref):
        return ref
    words = [shutil.which("git") or "git", "ls-remote", "--exit-code", url, ref, f"{ref}^{{}}"]
    try:
        listed = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return ref
    return listed.stdout.split()[0] if listed.stdout else ref
