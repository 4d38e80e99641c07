"""Count the memory of each way to train, and draw parallel.png and memory.png: python draw.py

The counts of README.md here, of the chart and of the table in ../README.md all come from this file; nothing of it was
measured. README.md says which lines of DeepSpeed 0.19.8 they were read from.
"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

HERE = Path(__file__).resolve().parent
GPU_GB, RESERVE_GB = 140, 25  # an H200; what to leave for activations, bf16 copies of fp32 weights, and buffers
HOST_GB = {1: 160, 8: 1920, 16: 1920}  # memory of a node by the number of GPUs: rt_HG, rt_HF, two of rt_HF
OFFLOADED = 4 + 8 + 4 + 2 + 2  # fp32 weights, Adam's moments and gradients, bf16 weights and gradients
CONFIGS = ("none", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
FORMULAS = {
    "none": ("4 + 4 + 8 = 16; on several GPUs 20", "4 for each of its GPUs"),
    "zero1": ("2 + max(2 + 2/N, 8/N) + 12/N", "4 for each of its GPUs"),
    "zero2": ("2 + 8/N + 12/N", "4 for each of its GPUs"),
    "zero3": ("2/N + 2/N + 12/N", "4"),
    "zero2_offload": ("2 + 0 + 0", "20/nodes + 2, or 4 for each of its GPUs"),
    "zero3_offload": ("0 + 0 + 0", "20/nodes + 2"),
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
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"  # Okabe and Ito's, safe for the colour-blind


def gpu_bytes(config, n):
    """Bytes per parameter on each of n GPUs as (weights, gradients, optimizer), at the peak of a step."""
    if config == "none":  # fp32; on several GPUs DistributedDataParallel keeps the gradients again in its buckets
        return 4, 4 if n == 1 else 8, 8
    if config == "zero1":  # all gradients and a copy of its own part, or the three copies that ZeRO-2 makes of the part
        return 2, max(2 + 2 / n, 8 / n), 12 / n
    if config == "zero2":  # its own part: bf16, the same flattened, and fp32 for the optimizer
        return 2, 8 / n, 12 / n
    if config == "zero3":  # the fp32 gradients are made piece by piece: a buffer, not counted here
        return 2 / n, 2 / n, 12 / n
    return (2 if config == "zero2_offload" else 0), 0, 0


def host_bytes(config, n):
    """Bytes per parameter in the memory of each node at the peak of loading, training or saving; n GPUs in all."""
    per_node = min(n, 8)
    loading = 4 if config.startswith("zero3") else 4 * per_node  # each process reads the weights as fp32
    training = 2 + (OFFLOADED * per_node / n if config.endswith("offload") else 0)  # 2: a save collects the weights
    return max(loading, training)


def largest(config, n):
    """(Billions of parameters that fit on n GPUs without activations and buffers, what sets the limit)."""
    limits = [(HOST_GB[n] / host_bytes(config, n), "host")]
    if sum(gpu_bytes(config, n)):
        limits.append((GPU_GB / sum(gpu_bytes(config, n)), "GPU"))
    return min(limits)


def gigabytes(model, method, config="none", n=1):
    """GB on each GPU for one of MODELS; only "full" knows another config than none."""
    size, head, tied = MODELS[model]
    adapters = 16 * 0.01 * size  # LoRA of rank 16 on all linear layers is about half of that 1 %
    return {
        "full": sum(gpu_bytes(config, n)) * size,
        "last layer": 4 * (size if tied else size - head) + 16 * head,  # a tied head is trained as a copy
        "LoRA": 2 * size + adapters,
        "QLoRA": 0.52 * (size - head * (2 - tied)) + 2 * head * (2 - tied) + adapters,  # 4 bit, but not the embeddings
    }[method] / 1e9


def plan(model, method):
    """The first (resource type, GPUs, config, GB) that leaves RESERVE_GB free."""
    for queue, n, config in [("rt_HG", 1, "none")] + [("rt_HF", 8, config) for config in CONFIGS[1:]]:
        if gigabytes(model, method, config, n) <= GPU_GB - RESERVE_GB:
            return queue, n, config, gigabytes(model, method, config, n)
    raise ValueError(f"{model} needs more than one node for {method}")


def memory_rows():
    """The lines of README.md's table."""
    for config in CONFIGS:
        name = "no file" if config == "none" else f"`{config}.json`"
        gpu = " / ".join(f"{sum(gpu_bytes(config, n)):g}" for n in (1, 8, 16))
        host = " / ".join(f"{host_bytes(config, n):g}" for n in (1, 8, 16))
        fits = ["{:.1f} ({})".format(*largest(config, n)) for n in (1, 8)]
        yield f"| {name} | {FORMULAS[config][0]} | {gpu} | {FORMULAS[config][1]} | {host} | {fits[0]} | {fits[1]} |"


def plan_rows():
    """The lines of the table in ../README.md and ../README.en.md."""
    for model in MODELS:
        cells = []
        for queue, n, config, size in (plan(model, method) for method in METHODS):
            cells.append(f"`{queue}` × 1, " + (f"`{config}.json`, " if n > 1 else "") + f"{size:.0f} GB")
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
        axes.text(x, total + 0.25, f"{total:g}{host}", ha="center", va="bottom", fontsize=11, bbox=paper)
    for name, text in {"falcon-7b": "7B (falcon, mpt, open-calm)", "open_llama_13b": "12B and 13B"}.items():
        y = (GPU_GB - RESERVE_GB) * 1e9 / MODELS[name][0]
        axes.axhline(y, color="black", linestyle="--", linewidth=1, zorder=0)
        axes.text(len(bars) - 0.45, y + 0.2, f"{text} fit below this line", ha="right", va="bottom", fontsize=11)
    axes.set_xticks(range(len(bars)), [label for label, _, _ in bars], fontsize=11)
    axes.set_ylabel("bytes per parameter on each GPU", fontsize=11)
    axes.set(xlim=(-0.5, len(bars) - 0.4), ylim=(0, 23.5))
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in (GREEN, ORANGE, BLUE)]
    axes.legend(handles, ["optimizer", "gradients", "weights"], frameon=False, fontsize=11, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    title = "Training all parameters on 8 GPUs, and on one (computed)"
    title += f"\nof {GPU_GB} GB on each GPU, {RESERVE_GB} are left for activations"
    axes.set_title(title, fontsize=11, loc="left")


def box(axes, x, y, width, height, colour, text=""):
    """A filled rectangle with text in it."""
    ink = "black" if colour == ORANGE else "white"
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=1.5))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5, color=ink)


def lane(axes, y, gpu, holds, work):
    """One GPU's time line from 0 to 8; work is a list of (start, length, colour, text), the rest is waiting."""
    axes.text(-0.2, y + 0.6, f"GPU {gpu}", ha="right", va="center", fontsize=10)
    axes.text(-0.2, y + 0.22, holds, ha="right", va="center", fontsize=8.5, color="#555555")
    axes.add_patch(Rectangle((0, y), 8, 0.8, facecolor="#EEEEEE", edgecolor="none"))
    for start, length, colour, text in work:
        box(axes, start, y, length, 0.8, colour, text)


def draw_parallel(figure):
    """Four panels: which GPU works on which part of the model and of the data, from left to right in time."""
    panels = figure.subplots(2, 2).flat
    notes = {
        "Data parallel": "the whole model, a part of the batch on each",
        "Naive model parallel": "some layers on each; one works, the rest wait",
        "Pipeline parallel": "the same, with micro-batches 1 to 4 in turn",
        "Tensor parallel": "a part of each layer on each, the same batch",
    }
    for axes, (title, note) in zip(panels, notes.items(), strict=True):
        for gpu in range(4):
            y = 3 - gpu
            if title == "Data parallel":
                text = f"data {gpu + 1}"
                work = [(0, 2.2, BLUE, text), (2.2, 4.4, ORANGE, text), (6.6, 1.4, GREEN, "sum")]
            elif title == "Naive model parallel":
                work = [(gpu * 0.667, 0.667, BLUE, ""), (8 - (gpu + 1) * 1.333, 1.333, ORANGE, "")]
            elif title == "Pipeline parallel":
                ahead = [((gpu + i) * 0.38, 0.38, BLUE, str(i + 1)) for i in range(4)]
                work = ahead + [(2.66 + (3 - gpu + i) * 0.76, 0.76, ORANGE, str(i + 1)) for i in range(4)]
            else:
                work = [(2 * i + part, 0.6, BLUE if i < 1.4 else ORANGE, "") for i in range(4) for part in (0, 1)]
                work += [(i + 0.6, 0.4, GREEN, "") for i in range(8)]
            holds = {"Data": "all layers", "Tensor": f"part {gpu + 1} of each"}.get(title.split()[0])
            lane(axes, y, gpu, holds or f"layers {10 * gpu + 1}–{10 * gpu + 10}", work)
        axes.set(xlim=(-2.35, 8.05), ylim=(-0.75, 4))
        axes.text(0, -0.15, "time, each panel on its own scale →", fontsize=9.5, va="top", color="#555555")
        axes.set_title(f"{title}\n", fontsize=12, loc="left", fontweight="bold")
        axes.text(-2.35, 4.05, note, fontsize=9.5)
        axes.axis("off")
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in (BLUE, ORANGE, GREEN, "#EEEEEE")]
    names = ["forward", "backward", "exchange between GPUs", "waiting"]
    figure.legend(handles, names, loc="lower center", ncols=4, frameon=False, fontsize=10)


def main():
    """Print the two tables and write the two pictures."""
    print(*memory_rows(), "", *plan_rows(), sep="\n")
    for name, draw, size in (("parallel", draw_parallel, (8, 5.2)), ("memory", draw_memory, (8, 4.8))):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.get_layout_engine().set(rect=(0, 0.06, 1, 0.94) if name == "parallel" else (0, 0, 1, 1))
        figure.savefig(HERE / f"{name}.png", dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
