"""Fetch a model from the Hugging Face hub once, so that jobs can run without a network.

Command:  bash jobs/fetch_model.sh rinna/japanese-gpt-neox-3.6b

A repository with safetensors weights goes into the hub's own cache (HF_HOME), under its own name.
One that has only ``.bin`` weights goes, converted, into a plain directory
CACHE_ROOT/models/OWNER--NAME: files added to the hub's cache would be passed over as soon as a job
asks the hub. A local directory in place of a name is converted where it lies (its ``.bin`` files
stay). Safetensors load faster, need no second copy in memory, and cannot carry code as pickles can.

Costs the size of the model in disk space, one shard more while a ``.bin`` repository is converted.
Interrupted, it goes on where it stopped when it is started again.
"""

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

# What a job needs beside the weights. Other formats (.h5, .msgpack, .onnx, .gguf) stay at the hub.
SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".py", ".md", ".tiktoken")
BIN_WEIGHTS = re.compile(r"(pytorch|adapter)_model(-\d+-of-\d+)?\.bin")
SAFE_WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors")
GB = 1e9
LOGIN = f"{Path(sys.executable).with_name('hf')} auth login"


def fail(message: str) -> None:
    """One line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def explain(error: Exception, model: str) -> None:
    """Turn what the hub's client raises into one line; raise again what nobody expects."""
    from huggingface_hub import errors

    reason = " ".join(str(error).split())[:200]
    if isinstance(error, errors.GatedRepoError):  # before its parent, RepositoryNotFoundError
        fail(f"{model} is gated. Accept its conditions on its page at the hub, then type: {LOGIN}")
    if isinstance(error, errors.RevisionNotFoundError):
        fail(f"{model} has no such revision ({reason}). Look at the names on its page at the hub")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        fail(
            f"{model} is no directory here and no model at the hub, or private. "
            f"Look at the name; or type: {LOGIN}"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | OSError | errors.HfHubHTTPError):
        if getattr(error, "errno", None) in (28, 122):  # ENOSPC, EDQUOT
            fail(
                f"the disk is full ({error}). Make room (on ABCI: show_quota) and type "
                "the same again"
            )
        if isinstance(error, PermissionError) or getattr(error, "errno", None) in (30, 37, 38):
            fail(f"{error}. Set CACHE_ROOT or HF_HOME to a directory of yours where files lock")
        fail(
            f"the hub does not answer ({type(error).__name__}: {reason}). Use "
            "a machine with a network and try again"
        )
    if type(error).__module__.startswith("http"):  # the client's own HTTP library
        fail(
            f"the hub is not reachable ({type(error).__name__}: {reason}). Use "
            "a machine with a network and try again"
        )
    raise error


def choose_files(names: list[str], model: str) -> tuple[list[str], bool]:
    """The files to fetch, and whether the weights are ``.bin`` only. Exits where there are none."""
    top = [name for name in names if "/" not in name]
    small = [
        name for name in top if name.endswith(SMALL_FILES) and not name.endswith(".bin.index.json")
    ]
    safe = [name for name in top if SAFE_WEIGHTS.fullmatch(name)]
    if safe:
        return small + safe, False
    weights = [name for name in top if BIN_WEIGHTS.fullmatch(name)]
    if not weights:
        fail(
            f"{model} has no weights in safetensors or .bin form, so transformers cannot load "
            "it. Choose another model"
        )
    return small + weights + [name for name in top if name == "pytorch_model.bin.index.json"], True


def safe_name(bin_name: str) -> str:
    """pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors, transformers' names."""
    return bin_name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"


def convert_shard(source: Path, target: Path) -> None:
    """Write the tensors of one ``.bin`` file as safetensors, and compare them bit by bit."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    try:
        # weights_only: a pickle could run code; mmap: no copy of the whole file in memory.
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen kinds for a file that is cut
        fail(
            f"{source} cannot be read ({' '.join(str(error).split())[:120]}). "
            "Delete it and type the same again"
        )
    others = [name for name, tensor in state.items() if not isinstance(tensor, torch.Tensor)]
    if others:
        fail(
            f"{source} holds {others[0]}, which is no tensor. Only plain weights can be "
            "converted: choose another model"
        )
    # Cloned, since safetensors refuses tensors that share memory, as tied embeddings may.
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    part = target.with_suffix(".part")
    save_file(tensors, part, metadata={"format": "pt"})
    with safe_open(part, "pt") as written:
        same = set(written.keys()) == set(tensors) and all(
            (again := written.get_tensor(name)).dtype == tensor.dtype
            and torch.equal(again.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
            for name, tensor in tensors.items()
        )
    if not same:
        fail(
            f"{part} differs from {source} after writing. The disk or the memory has a fault: "
            "try another machine"
        )
    part.rename(target)


def convert_directory(directory: Path, shards: list[str], delete: bool) -> None:
    """Convert the named ``.bin`` shards of a directory one by one, then write their index."""
    for number, name in enumerate(sorted(shards), 1):
        source, target = directory / name, directory / safe_name(name)
        if not target.exists():
            print(f"convert   {number} of {len(shards)}: {name} -> {target.name}")
            convert_shard(source, target)
        if delete:
            source.unlink(missing_ok=True)
    index = directory / "pytorch_model.bin.index.json"
    if index.exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {
            tensor: safe_name(shard) for tensor, shard in content["weight_map"].items()
        }
        text = json.dumps(content, indent=2)
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        if delete:
            index.unlink()


def check_space(needed: int, place: Path) -> None:
    """Exit when a file system has less room than the bytes needed."""
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    print(
        f"space     {needed / GB:.1f} GB to fetch, {free / GB:.1f} GB free at {place} "
        "(a quota may leave less)"
    )
    if needed > free:
        fail(
            f"{needed / GB:.1f} GB do not fit into the {free / GB:.1f} GB free at {place}. "
            "Make room or set CACHE_ROOT"
        )


def fetch(model: str, revision: str | None) -> str:
    """Bring a model from the hub; return the MODEL to give to a job."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    info = HfApi().model_info(model, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    names, only_bin = choose_files(list(sizes), model)
    if not only_bin:
        disable_progress_bars()
        plan = snapshot_download(model, revision=info.sha, allow_patterns=names, dry_run=True)
        enable_progress_bars()
        needed = sum(file.file_size for file in plan if file.will_download)
        check_space(needed, Path(constants.HF_HUB_CACHE))
        # By branch, not commit: the cache then notes its commit, and an offline job finds it.
        snapshot_download(model, revision=revision, allow_patterns=names)
        if revision is None:
            return model
        return snapshot_download(model, revision=revision, local_files_only=True)
    root = Path(os.environ.get("CACHE_ROOT") or Path.home() / ".cache") / "models"
    directory = root / "--".join([*model.split("/"), *([revision] if revision else [])])
    shards = [name for name in names if BIN_WEIGHTS.fullmatch(name)]
    done = [name for name in shards if (directory / safe_name(name)).exists()]
    missing = [name for name in names if name not in done and not (directory / name).exists()]
    if (directory / "model.safetensors.index.json").exists() and len(done) == len(shards):
        missing = [name for name in missing if name != "pytorch_model.bin.index.json"]
    largest = max((sizes[name] for name in shards if name not in done), default=0)
    check_space(sum(sizes[name] for name in missing) + largest, root)
    if missing:
        snapshot_download(model, revision=info.sha, allow_patterns=missing, local_dir=directory)
    convert_directory(directory, shards, delete=True)
    # The client's notes on the files that were deleted.
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    return str(directory)


def convert_local(directory: Path) -> str:
    """Convert a local directory that has only ``.bin`` weights, beside them; return its path."""
    names = [path.name for path in directory.iterdir() if path.is_file()]
    chosen, only_bin = choose_files(names, str(directory))
    if only_bin:
        shards = [name for name in chosen if BIN_WEIGHTS.fullmatch(name)]
        check_space(sum((directory / name).stat().st_size for name in shards), directory)
        convert_directory(directory, shards, delete=False)
    return str(directory.resolve())


def places() -> str:
    """CACHE_ROOT and HF_HOME for a job, where it would not find them by itself as env.sh does."""
    here, user = Path(__file__).resolve().parts, os.environ.get("USER", "")
    group = Path("/groups", here[2], user) if here[1] == "groups" else None
    home = (group / "cache" if group else Path.home() / ".cache").resolve()
    root = Path(os.environ.get("CACHE_ROOT") or home).resolve()
    hub = Path(os.environ.get("HF_HOME") or root / "huggingface").resolve()
    found = {"CACHE_ROOT": root} if root != home else {}
    found |= {"HF_HOME": hub} if hub != root / "huggingface" else {}
    return "".join(f",{name}={path}" for name, path in found.items())


def main(argv: list[str] | None = None) -> None:
    """Fetch or convert one model and print how a job uses it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    parser.add_argument(
        "model", help="name at the hub (OWNER/NAME), or a local directory to convert"
    )
    parser.add_argument("--revision", help="branch, tag or commit; default: the main branch")
    args = parser.parse_args(argv)
    if Path(args.model).is_dir():
        place = convert_local(Path(args.model))
    else:
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
            fail("HF_HUB_OFFLINE is set, so nothing can be fetched. Type: unset HF_HUB_OFFLINE")
        try:
            place = fetch(args.model, args.revision)
        except Exception as error:  # explain() raises again what it does not know
            explain(error, args.model)
    settings = f"MODEL={place},HF_HUB_OFFLINE=1{places()}"
    print(f"ready     use it without a network: {settings.replace(',', ' ')} bash job.sh")
    job = f"qsub -P GROUP -v {settings} job.sh"
    print(f"          or in a job:              {job}")


if __name__ == "__main__":
    main()
