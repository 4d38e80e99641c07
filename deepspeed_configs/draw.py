"""Count the memory of each way to train, and draw parallel.png and memory.png: python draw.py

The counts and plans in README.md and README.en.md here, and the pictures, all come from this file;
nothing of it was measured. The READMEs say which code of DeepSpeed 0.19.8 they were read from.
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

HERE = Path(__file__).resolve().parent
GPU_GB = 140  # an H200
RESERVE_GB = 25  # to leave for activations, bf16 copies of fp32 weights, and buffers
HOST_GB = {1: 160, 8: 1920, 16: 1920}  # of a node by number of GPUs: rt_HG, rt_HF, two of rt_HF
OFFLOADED = 4 + 8 + 4 + 4 + 4  # the step's weights, Adam's moments, gradients; those sent, added up
CONFIGS = ("none", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
FORMULAS = {
    "none": ("4 + 4 + 8", "4 for each of its GPUs"),
    "zero1": ("4 + max(4 + 4/N, 8/N) + 12/N", "4 for each of its GPUs"),
    "zero2": ("4 + 8/N + 12/N", "4 for each of its GPUs"),
    "zero3": ("4/N + 4/N + 12/N", "4"),
    "zero2_offload": ("4 + 0 + 0", "24/nodes + 4, or 4 for each of its GPUs"),
    "zero3_offload": ("0 + 0 + 0", "24/nodes + 4"),
}
MODELS = {  # parameters, those of the output matrix, whether that is also the input embedding
    "Cerebras-GPT-13B": (12_853_386_240, 50257 * 5120, True),
    "dolly-v2-12b": (11_841_894_400, 50280 * 5120, False),
    "falcon-7b": (6_921_720_704, 65024 * 4544, True),
    "japanese-gpt-neox-3.6b": (3_607_245_312, 32000 * 2816, False),
    "mpt-7b": (6_649_286_656, 50432 * 4096, True),
    "open-calm-7b": (6_871_982_080, 52224 * 4096, False),
    "open_llama_13b": (13_015_864_320, 32000 * 5120, False),
}
METHODS = ("full", "last layer", "LoRA", "QLoRA")
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"  # Okabe and Ito's, for the colour-blind too


def gpu_bytes(config, n):
    """Bytes per parameter on each of n GPUs as (weights, gradients, optimizer); a step's peak."""
    if config == "none":  # while batches are accumulated on several GPUs, 4 more for gradients
        return 4, 4, 8
    # All gradients and a copy of its own part, or the two copies that ZeRO-2 makes of the part.
    if config == "zero1":
        return 4, max(4 + 4 / n, 8 / n), 12 / n
    if config == "zero2":  # its own part, and the same flattened for the optimizer
        return 4, 8 / n, 12 / n
    if config == "zero3":  # the flattened gradients are made piece by piece: a buffer, not counted
        return 4 / n, 4 / n, 12 / n
    return (4 if config == "zero2_offload" else 0), 0, 0


def host_bytes(config, n):
    """Bytes per parameter in each node's memory, n GPUs in all; peak of load, training, save."""
    per_node = min(n, 8)
    loading = 4 if config.startswith("zero3") else 4 * per_node  # each process reads fp32 weights
    training = 4  # a save collects the weights
    if config.endswith("offload"):
        training += OFFLOADED * per_node / n
    return max(loading, training)


def largest(config, n):
    """(Billions of parameters that fit on n GPUs without activations and buffers, its limit)."""
    limits = [(HOST_GB[n] / host_bytes(config, n), "host")]
    if sum(gpu_bytes(config, n)):
        limits.append((GPU_GB / sum(gpu_bytes(config, n)), "GPU"))
    return min(limits)


def gigabytes(model, method, config="none", n=1):
    """GB on each GPU for one of MODELS; only "full" knows another config than none."""
    size, head, tied = MODELS[model]
    adapters = 16 * 0.01 * size  # LoRA of rank 16 on all linear layers is about half of that 1 %
    embeddings = head if tied else 2 * head
    return {
        "full": sum(gpu_bytes(config, n)) * size,
        "last layer": 4 * (size if tied else size - head) + 16 * head,  # of a tied head a copy
        "LoRA": 2 * size + adapters,
        "QLoRA": 0.52 * (size - embeddings) + 2 * embeddings + adapters,  # embeddings not in 4 bit
    }[method] / 1e9


def plan(model, method):
    """The first (resource type, GPUs, config, GB) that leaves RESERVE_GB free."""
    for config in CONFIGS:
        queue, n = ("rt_HG", 1) if config == "none" else ("rt_HF", 8)
        if gigabytes(model, method, config, n) <= GPU_GB - RESERVE_GB:
            return queue, n, config, gigabytes(model, method, config, n)
    raise ValueError(f"{model} needs more than one node for {method}")


def memory_rows():
    """The lines of the table of configurations in README.md and README.en.md."""
    for config in CONFIGS:
        name = "no file" if config == "none" else f"`{config}.json`"
        gpu = " / ".join(f"{sum(gpu_bytes(config, n)):g}" for n in (1, 8, 16))
        host = " / ".join(f"{host_bytes(config, n):g}" for n in (1, 8, 16))
        fits = ["{:.1f} ({})".format(*largest(config, n)) for n in (1, 8)]
        gpu_formula, host_formula = FORMULAS[config]
        cells = (name, gpu_formula, gpu, host_formula, host, *fits)
        yield f"| {' | '.join(cells)} |"


def plan_rows():
    """The lines of the table of models in README.md and README.en.md."""
    for model in MODELS:
        cells = []
        for queue, n, config, size in (plan(model, method) for method in METHODS):
            file = f"`{config}.json`, " if n > 1 else ""
            cells.append(f"`{queue}` × 1, {file}{size:.0f} GB")
        yield f"| {model} | {' | '.join(cells)} |"


def draw_memory(figure):
    """Bars of bytes per parameter and GPU; a line below which each group of models fits."""
    axes = figure.add_subplot()
    bars = [("no file,\n1 GPU", "none", 1), ("no file,\n8 GPUs", "none", 8)]
    bars += [(config.replace("_", "\n"), config, 8) for config in CONFIGS[1:]]
    for x, (_, config, n) in enumerate(bars):
        bottom, total = 0, sum(gpu_bytes(config, n))
        for part, colour in zip(gpu_bytes(config, n), (BLUE, ORANGE, GREEN), strict=True):
            axes.bar(x, part, 0.62, bottom, color=colour, edgecolor="white")
            bottom += part
        host = f"\n+ {OFFLOADED / n:g} on\nthe host" if config.endswith("offload") else ""
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        style = {"ha": "center", "va": "bottom", "fontsize": 11, "bbox": paper}
        axes.text(x, total + 0.25, f"{total:g}{host}", **style)
    groups = {"falcon-7b": "7B (falcon, mpt, open-calm)", "open_llama_13b": "12B and 13B"}
    for name, group in groups.items():
        y, text = (GPU_GB - RESERVE_GB) * 1e9 / MODELS[name][0], f"{group} fit below this line"
        axes.axhline(y, color="black", linestyle="--", linewidth=1, zorder=0)
        axes.text(len(bars) - 0.45, y + 0.2, text, ha="right", va="bottom", fontsize=11)
    axes.set_xticks(range(len(bars)), [label for label, _, _ in bars], fontsize=11)
    axes.set_ylabel("bytes per parameter on each GPU", fontsize=11)
    axes.set(xlim=(-0.5, len(bars) - 0.4), ylim=(0, 19.5))
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in (GREEN, ORANGE, BLUE)]
    names = ["optimizer", "gradients", "weights"]
    axes.legend(handles, names, frameon=False, fontsize=11, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    title = "Training all parameters on 8 GPUs, and on one (computed)"
    title += f"\nof {GPU_GB} GB on each GPU, {RESERVE_GB} are left for activations"
    axes.set_title(title, fontsize=11, loc="left")


def box(axes, x, y, width, height, colour, text=""):
    """A filled rectangle with text in it."""
    look = {"facecolor": colour, "edgecolor": "white", "linewidth": 1.5}
    axes.add_patch(Rectangle((x, y), width, height, **look))
    look = {"fontsize": 9.5, "color": "black" if colour == ORANGE else "white"}
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", **look)


def lane(axes, y, gpu, holds, work):
    """One GPU's time line from 0 to 8; work is (start, length, colour, text)s, the rest waits."""
    axes.text(-0.2, y + 0.6, f"GPU {gpu}", ha="right", va="center", fontsize=10)
    axes.text(-0.2, y + 0.22, holds, ha="right", va="center", fontsize=8.5, color="#555555")
    axes.add_patch(Rectangle((0, y), 8, 0.8, facecolor="#EEEEEE", edgecolor="none"))
    for start, length, colour, text in work:
        box(axes, start, y, length, 0.8, colour, text)


def work_of(panel, gpu):
    """What a GPU holds in a panel, and its work as (start, length, colour, text)s."""
    layers, four = f"layers {10 * gpu + 1}–{10 * gpu + 10}", range(4)
    if panel == "Data parallel":
        text = f"data {gpu + 1}"
        work = [(0, 2.2, BLUE, text), (2.2, 4.4, ORANGE, text), (6.6, 1.4, GREEN, "sum")]
        return "all layers", work
    if panel == "Naive model parallel":
        backward = (8 - (gpu + 1) * 1.333, 1.333, ORANGE, "")
        return layers, [(gpu * 0.667, 0.667, BLUE, ""), backward]
    if panel == "Pipeline parallel":
        work = [((gpu + i) * 0.38, 0.38, BLUE, str(i + 1)) for i in four]
        work += [(2.66 + (3 - gpu + i) * 0.76, 0.76, ORANGE, str(i + 1)) for i in four]
        return layers, work
    work = [(i, 0.6, BLUE if i < 4 else ORANGE, "") for i in range(8)]
    return f"part {gpu + 1} of each", work + [(i + 0.6, 0.4, GREEN, "") for i in range(8)]


def draw_parallel(figure):
    """Four panels: which GPU works on which part of model and data, from left to right in time."""
    panels = figure.subplots(2, 2).flat
    notes = {
        "Data parallel": "the whole model, a part of the batch on each",
        "Naive model parallel": "some layers on each; one works, the rest wait",
        "Pipeline parallel": "the same, with micro-batches 1 to 4 in turn",
        "Tensor parallel": "a part of each layer on each, the same batch",
    }
    for axes, (title, note) in zip(panels, notes.items(), strict=True):
        for gpu in range(4):
            lane(axes, 3 - gpu, gpu, *work_of(title, gpu))
        axes.set(xlim=(-2.35, 8.05), ylim=(-0.75, 4))
        note_on_time = "time, each panel on its own scale →"
        axes.text(0, -0.15, note_on_time, fontsize=9.5, va="top", color="#555555")
        axes.set_title(f"{title}\n", fontsize=12, loc="left", fontweight="bold")
        axes.text(-2.35, 4.05, note, fontsize=9.5)
        axes.axis("off")
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in (BLUE, ORANGE, GREEN, "#EEEEEE")]
    names = ["forward", "backward", "exchange between GPUs", "waiting"]
    figure.legend(handles, names, loc="lower center", ncols=4, frameon=False, fontsize=10)


def main():
    """Print the two tables and write the two pictures."""
    print(*memory_rows(), "", *plan_rows(), sep="\n")
    pictures = {  # how to draw each, its size in inches and the part of it that is drawn on
        "parallel": (draw_parallel, (8, 5.2), (0, 0.06, 1, 0.94)),
        "memory": (draw_memory, (8, 4.8), (0, 0, 1, 1)),
    }
    for name, (draw, size, part) in pictures.items():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.get_layout_engine().set(rect=part)
        figure.savefig(HERE / f"{name}.png", dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
