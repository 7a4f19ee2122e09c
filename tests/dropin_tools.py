"""Recorded results of the published recover scripts, laid out as those scripts' own inputs, for the stand-ins."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fd2fast.dropin.draws import FORMAT

FILE = Path(__file__).parent / "data" / "released.npz"
CASES: dict[str, dict[str, Any]] = json.loads(str(np.load(FILE)["meta"]))
SCRIPTS = {"sre2l": "recover_FD2", "fadrm": "recover_FD2_FADRM"}


@dataclass(frozen=True)
class Laid:
    """A case's folder, the command line that asks for it, and the images that the published script made."""

    case: dict[str, Any]
    script: str
    folder: Path
    arguments: list[str]
    wanted: dict[tuple[int, int], NDArray[np.float64]]  # (class, image id) -> [3, S, S], normalised, before rounding

    @property
    def images(self) -> Path:
        return self.folder / "syn" / "exp"

    def image(self, label: int, image_id: int) -> Path:
        return self.images / f"new{label:03d}" / f"class{label:03d}_id{image_id:03d}.jpg"

    def jpeg(self, label: int, image_id: int) -> bytes:
        """What the published script writes: clipped, truncated to 8 bits, Pillow's JPEG as it comes."""
        mean, std = (np.array(self.case[name])[:, None, None] for name in ("mean", "std"))
        unit = np.clip(self.wanted[label, image_id] * std + mean, 0, 1)
        file = io.BytesIO()
        Image.fromarray((unit * 255).astype(np.uint8).transpose(1, 2, 0)).save(file, "JPEG")
        return file.getvalue()


def network_state(data: Any, prefix: str) -> dict[str, Tensor]:
    """A network's tensors: as they are, or as NAME#codes, four two-bit indices a byte into NAME#levels, of shape NAME#shape."""
    found: dict[str, Tensor] = {}
    for name in data.files:
        key, _, kind = name.removeprefix(f"{prefix}/").partition("#")
        if not name.startswith(f"{prefix}/") or kind in ("levels", "shape"):
            continue
        values = data[name]
        if kind == "codes":
            shape = tuple(int(n) for n in data[f"{prefix}/{key}#shape"])
            indices = (values[:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
            values = data[f"{prefix}/{key}#levels"][indices.reshape(-1)[: int(np.prod(shape))]].reshape(shape)
        found[key] = torch.tensor(values)
    return found


def lay_out(tag: str, folder: Path) -> Laid:
    """Write pool, patches, draws and a description of the data set of one recorded case below `folder`."""
    case, script = CASES[tag], SCRIPTS[tag]
    classes, ipc, rows = case["classes"], case["ipc"], case["segment_size"]
    factor = "2" if tag == "sre2l" else "1"
    (folder / "pool").mkdir(parents=True)
    with np.load(FILE) as data:
        for teacher in case["teachers"]:
            name = teacher["tag"]
            content = {
                teacher["key"]: network_state(data, f"{name}/backbone"),
                "cal": network_state(data, f"{name}/cal"),
                "feature_center": torch.tensor(data[f"{name}/feature_center"]),
            }
            torch.save(content, folder / "pool" / teacher["file"])
        for label in range(classes):
            place = folder / "patches" / factor / f"{label:05d}"
            place.mkdir(parents=True)
            for image_id in range(ipc):
                pixels = data[f"{tag}/patch/{label}/{image_id}"].transpose(1, 2, 0)
                # the pixels as they are: the content of a .jpg may be a PNG for every reader
                Image.fromarray(pixels).save(place / f"class{label:05d}_id{image_id:05d}.jpg", "PNG")
        lines: list[dict[str, Any]] = [{"format": FORMAT}]
        wanted = {}
        for image_id in range(ipc):
            for block in range(classes // rows):
                labels = range(block * rows, block * rows + rows)
                views = f"{tag}/prior_draws/{block}/{image_id}"
                lines.append(
                    {
                        "ipc_id": image_id,
                        "first_class": labels[0],
                        "end_class": labels[-1] + 1,
                        "patches": [f"{label:05d}/class{label:05d}_id{image_id:05d}.jpg" for label in labels],
                        "views": data[views].tolist() if views in data.files else [],
                        "draws": data[f"{tag}/draws/{block}/{image_id}"].tolist(),
                    }
                )
                for label, image in zip(labels, data[f"{tag}/final/{block}/{image_id}"], strict=True):
                    wanted[label, image_id] = image
    (folder / "draws.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = {name: case[name] for name in ("classes", "size", "mean", "std", "jitter")}
    (folder / "data.json").write_text(json.dumps(told))
    return Laid(case, script, folder, command_line(tag, folder), wanted)


def command_line(tag: str, folder: Path) -> list[str]:
    """The flags of the recorded case, in the published script's spelling."""
    case = CASES[tag]
    files = [teacher["file"].removesuffix("cal.pth").split("_") for teacher in case["teachers"]]
    names = [teacher["key"] for teacher in case["teachers"]]
    given: dict[str, Any] = {
        "dataset_name": "recorded",
        "exp_name": "exp",
        "class_num": case["segment_size"],
        "subprocess_num": 1,
        "syn_data_path": folder / "syn",
        "patch_dir": folder / "patches",
        "model_pool_dir": folder / "pool",
        "pretrained_model_type": "offline",
        "model_choice": names,
        "M": [maps[1:] for _, maps, _ in files],
        "cal_ratio": [str(float(alpha)) for *_, alpha in files],
        "lr": case["lr"],
        "r_bn": case["r_bn"],
        "FC_ratio": case["lam"],
        "IntraFC_ratio": case["beta"],
        "SC_ratio": 1 - case["lam"],
        "SC_loss_threshold": 0.0,
        "ipc_start": 0,
        "ipc_end": case["ipc"],
        "initialisation_method": "Patches",
        "patch_diff": "2" if tag == "sre2l" else "1",
        "draws": folder / "draws.jsonl",
        "fd2fast_dataset": folder / "data.json",
        "fd2fast_precision": "fp64",
        "fd2fast_device": "cpu",
    }
    if tag == "sre2l":
        given |= {"selected_size": 1, "voter_type": "equal", "iteration": case["iterations"][0]}
    else:
        given |= {
            "optimization_budgets": case["iterations"],
            "input_size_lis": case["sizes"],
            "alpha": case["residual"],
        }
    arguments = ["--apply_data_augmentation", "--FC", "--SC", "--store_best_images"]
    for name, value in given.items():
        arguments += [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return arguments
