"""A checkpoint is a folder: step-000400/{model.pt, optim.pt, meta.json, tokenizer.model}, with LoRA
also lora.pt. The file `latest` beside the steps names the newest one.

    save(folder, model, meta, tokenizer_path)      # atomic: a crash leaves the previous step intact
    model, tokenizer_path, meta = load(folder)     # ours, Meta's, or Hugging Face's

Checksums are verified when a file is read. Loading never executes code from a pickle.
"""

import hashlib
import json
import os
import re
import shutil
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn

from model import LLaMA, LLaMAConfig
from tools.config import UserError, check_regular

# What marks a folder of published weights: Meta's, Hugging Face's, an adapter, MiniGPT-4's files.
PUBLISHED = ("params.json", "config.json", "adapter_config.json", "eva_vit_g.pth")


# -- writing --------------------------------------------------------------------------------------

def save(folder, model: nn.Module, meta: dict, tokenizer_path=None, optimizer: dict | None = None,
         weights: dict | None = None, adapters: dict | None = None) -> Path:
    """Writes folder/step-NNNNNN, points folder/latest at it, and keeps one step before it.

    meta must hold "step". `weights` replace model.state_dict() if that is sharded (FSDP) or has
    adapters in it (LoRA). `adapters` go into lora.pt. Raises OSError (disk full, ...).
    """
    folder = Path(folder)
    target = folder / f"step-{meta['step']:06d}"
    partial = folder / f".{target.name}.partial"
    for leftover in steps(folder, r"\.step-[0-9]+\.partial"):  # of saves that were killed
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        torch.save(model.state_dict() if weights is None else weights, partial / "model.pt")
        if optimizer is not None:
            torch.save(optimizer, partial / "optim.pt")
        if adapters is not None:
            torch.save(adapters, partial / "lora.pt")
        if tokenizer_path is not None:
            shutil.copy(tokenizer_path, partial / "tokenizer.model")
        meta = {**meta, "config": asdict(model.config), **environment()}
        meta["checksum"] = checksum(meta, partial / "tokenizer.model")
        (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for file in [*partial.iterdir(), partial]:
            flush_to_disk(file)
        replace_folder(partial, target)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        message = f"could not write {target} ({error}); earlier checkpoints are intact"
        raise OSError(message) from error
    (folder / ".latest.partial").write_text(target.name, encoding="utf-8")
    flush_to_disk(folder / ".latest.partial")
    os.replace(folder / ".latest.partial", folder / "latest")
    flush_to_disk(folder)  # makes the renames durable
    # Keep `target` and one step before it. `target` is excluded by name, not by number: a run that
    # was started again with a smaller --steps has the lower number.
    others = [step for step in steps(folder) if step != target]
    for old in others[:-1]:
        shutil.rmtree(old)
    return target


def environment() -> dict:
    """What bit-exact reproduction depends on."""
    return dict(torch=torch.__version__, threads=torch.get_num_threads(),
                isa=torch.backends.cpu.get_cpu_capability())


def checksum(meta: dict, tokenizer: Path) -> int:
    """CRC32 of meta.json (without this number) and of the tokenizer; .pt files have their own."""
    text = json.dumps({k: v for k, v in meta.items() if k != "checksum"}, sort_keys=True)
    crc = zlib.crc32(text.encode())
    if tokenizer.exists():
        crc = zlib.crc32(tokenizer.read_bytes(), crc)
    return crc


def flush_to_disk(path: Path) -> None:
    """fsync: before it, a file may exist in memory only and be lost with the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(new: Path, target: Path) -> None:
    """Renames `new` to `target`, which may exist: a folder cannot be renamed onto another one."""
    replaced = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.rename(target, replaced)
    os.rename(new, target)
    shutil.rmtree(replaced, ignore_errors=True)


# -- finding --------------------------------------------------------------------------------------

def steps(folder: Path, name: str = "step-[0-9]+") -> list[Path]:
    """The step folders by number, oldest first. Anything else in the folder is the user's, such as
    copies, links and files, and is left alone."""
    found = [path for path in folder.glob("*") if re.fullmatch(name, path.name)]
    folders = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(folders, key=lambda path: int(re.sub("[^0-9]", "", path.name)))


def find(folder) -> Path:
    """The folder that holds the files: `folder` itself, or the step that its `latest` names."""
    folder = Path(folder)
    if any((folder / name).exists() for name in ("model.pt", *PUBLISHED)):
        return folder
    found = steps(folder)
    if (folder / "latest").is_file():
        named = folder / (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
        if named in found:
            return named
    if found:  # it crashed before `latest` was updated
        return found[-1]
    siblings = sorted(path.parent.name for path in folder.parent.glob("*/latest"))
    hint = "`python train_sft.py` trains one in minutes"
    if siblings:
        hint = f"{folder.parent} has {', '.join(siblings)}"
    raise UserError(f"no checkpoint in {folder}; {hint}")


def history(folder) -> list[Path]:
    """The step folders of a run, newest first."""
    newest = find(folder)
    return [newest] + [step for step in reversed(steps(Path(folder))) if step != newest]


# -- reading --------------------------------------------------------------------------------------

def read(path: Path, mmap: bool = False) -> dict:
    """torch.load without code execution, after verifying the CRC32 of every part of the file.

    With mmap, processes on one machine share its pages. Raises UserError for a damaged file.
    """
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            # testzip() skips folders, and one damaged bit makes a part look like a folder.
            damaged = archive.testzip() or any(p.external_attr & 16 for p in archive.infolist())
        if not damaged:
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
        reason = "a checksum is wrong"
    except (FileNotFoundError, PermissionError):  # not damaged
        raise
    except Exception as error:  # a damaged zip file raises almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise UserError(f"{path} is damaged or incomplete ({reason})")


def read_meta(step: Path) -> dict:
    """meta.json of a step folder. Raises UserError if it or the tokenizer beside it is damaged."""
    try:
        meta = json.loads((step / "meta.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{step / 'meta.json'} is damaged ({error})") from None
    if "checksum" in meta and meta["checksum"] != checksum(meta, step / "tokenizer.model"):
        raise UserError(f"{step / 'meta.json'} or tokenizer.model beside it is damaged (checksum)")
    return meta


def digest(path) -> str:
    """Identifies the content of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def fingerprint(folder) -> str:
    """Identifies weights without reading them: by the checksums that model.pt lists, or for
    published files by their names and sizes."""
    step = find(folder)
    if (step / "model.pt").exists():
        try:
            with zipfile.ZipFile(step / "model.pt") as archive:
                key = [part.CRC for part in archive.infolist()]
        except zipfile.BadZipFile as error:
            raise UserError(f"{step / 'model.pt'} is damaged ({error})") from None
    else:
        key = sorted((file.name, file.stat().st_size) for file in step.iterdir() if file.is_file())
    return f"{zlib.crc32(repr(key).encode()):08x}"


def peek(folder) -> tuple[LLaMAConfig, Path, dict]:
    """Like load, but returns the model's config instead of the model, without reading weights."""
    step = find(folder)
    if not (step / "meta.json").exists():
        from tools import convert
        source = convert.open_folder(step)
        return source.config, source.tokenizer, source.meta
    meta = read_meta(step)
    return LLaMAConfig(**meta["config"]), step / "tokenizer.model", meta


def window(meta: dict, config: LLaMAConfig) -> int:
    """The longest context, in tokens, that the model was trained on."""
    return meta.get("window", config.max_seq_len)


def load(folder, mmap: bool = False, network: nn.Module | None = None,
         **options) -> tuple[nn.Module, Path, dict]:
    """Returns the model, the path of its tokenizer.model, and meta.json as a dict.

    With `network`, the file may hold only the parameters that were trained in it, such as one
    layer between frozen parts. Published folders, and the options dtype, device and quantize, are
    handled by tools/convert.py. Raises UserError for anything missing or damaged.
    """
    step = find(folder)
    if options or not (step / "meta.json").exists():
        from tools import convert
        return convert.load(step, **options)
    meta = read_meta(step)
    weights = {name: w.float() for name, w in read(step / "model.pt", mmap).items()}
    model = network
    if network is None:
        with torch.device("meta"):  # allocates nothing: load_state_dict assigns the weights
            model = LLaMA(LLaMAConfig(**meta["config"]))
    else:
        trained = [name for name, p in network.named_parameters() if p.requires_grad]
        if missing := [name for name in trained if name not in weights]:
            raise UserError(f"{step / 'model.pt'} does not hold {missing[0]}")
        weights = {**network.state_dict(), **weights}
    try:
        model.load_state_dict(weights, assign=network is None)
    except RuntimeError as error:
        why = " ".join(str(error).split("\n\t")[1:3])
        file = step / "model.pt"
        raise UserError(f"{file} does not fit the config in meta.json: {why}") from None
    if network is None:
        model.tie()
    return model.eval(), step / "tokenizer.model", meta
