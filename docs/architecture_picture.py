"""Draws architecture.svg, the layers of the package: ``python docs/architecture_picture.py``."""

from __future__ import annotations

from html import escape
from pathlib import Path

# One row per layer, from the top down. A row holds boxes: name, job, files.
ROWS = [
    [("cli/", "the command line", "main  demo  learning  inspection")],
    [
        (
            "results/",
            "what a run measured, and how it is shown",
            "curves  record  charts  figures  loggers  report",
        )
    ],
    [
        ("blip", "BLIP: hooks, preset, checkpoints", "on_task_end  on_train_batch_end  paper"),
        ("baselines/", "other methods", "ewc  si  mas  lwf  gpm  frozen_body  joint"),
    ],
    [
        ("by_hand", "BLIP without a Trainer", "bits  state  consolidate  wrap"),
        ("memory", "what BLIP remembers", "made, consolidated, saved, restored"),
    ],
    [
        ("consolidation", "a boundary", "measure, choose, freeze"),
        ("checkpoint", "versions", "version 1 still loads"),
        ("tracking", "parameters", "include, exclude"),
    ],
    [
        ("settings", "arguments", "defaults, checks, preset"),
        ("strengths", "of the defaults", "prior, pull, damping"),
        ("boundary", "its report", "the names of metrics"),
    ],
    [
        (
            "tasks/",
            "tasks, streams, and the callback that ends tasks",
            "task  streams  datamodule  sequence  boundaries  stopping  environments  heads  norm_stats",
        )
    ],
    [
        (
            "trainer/",
            "what depends on Lightning's inside, and on processes",
            "internals  classes  requirements  logging  processes  random_state  task_batches",
        )
    ],
    [("optim/", "the optimizer wrapper", "optimizer  effective_step  averaging")],
    [
        (
            "frozen/",
            "what is frozen, in each basis",
            "base  diagonal  kronecker  network  gains  packing  fused",
        )
    ],
    [
        ("fisher/", "Fisher information", "diagonal  likelihood  recorder  rules/"),
        ("metrics", "metrics of a sequence", "average score, transfer, forgetting"),
    ],
]
#: From this row down nothing imports Lightning.
GROUND = 8
CORE = ["#f7e7cf"] * 4
FILLS = ["#e3e8fb", "#dcefe6", *CORE, "#f3dde6", "#e6e0f3", *["#d9ebf5"] * 3]
LEFT, WIDTH, HEIGHT, GAP, MARK = 64, 820, 56, 10, 34
# Outside the boxes: readable on white as on black.
GREY = "#80838f"


def text(x: float, y: float, size: int, words: str, style: str) -> str:
    """Return a line of text."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" {style}>{escape(words)}</text>'


def box(x: float, y: float, width: float, fill: str, name: str, job: str, files: str) -> list[str]:
    """Return a box with its name and its job in one line, and its files in another."""
    shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{HEIGHT}" rx="6" stroke="#5b6078"'
    # A non-breaking space, because a leading one would be dropped.
    title = f'<tspan font-weight="600">{escape(name)}</tspan>\u00a0 {escape(job)}'
    mono = 'font-family="ui-monospace, Menlo, Consolas, monospace"'
    return [
        f'<rect fill="{fill}" {shape}/>',
        f'<text x="{x + 12:g}" y="{y + 23:g}" font-size="14" fill="#1d2033">{title}</text>',
        text(x + 12, y + 43, 12, files, f'{mono} fill="#3c4157" xml:space="preserve"'),
    ]


def picture() -> str:
    """Return the picture as SVG."""
    parts, y = [], 10
    for row, (boxes, fill) in enumerate(zip(ROWS, FILLS, strict=True)):
        if row == GROUND:
            y += MARK - GAP
            path = f"M{LEFT} {y - MARK + 5:g}H{LEFT + WIDTH}"
            words = "below this line: tensors and modules only, no Lightning"
            parts += [
                f'<path d="{path}" stroke="{GREY}" stroke-dasharray="5 4"/>',
                text(LEFT + WIDTH, y - MARK + 21, 12, words, f'fill="{GREY}" text-anchor="end"'),
            ]
        width = (WIDTH - GAP * (len(boxes) - 1)) / len(boxes)
        for column, words in enumerate(boxes):
            parts += box(LEFT + column * (width + GAP), y, width, fill, *words)
        y += HEIGHT + GAP
    arrow = f"M30 12V{y - 24}m-6 -8l6 10l6 -10"
    parts.append(f'<path d="{arrow}" fill="none" stroke="{GREY}" stroke-width="2"/>')
    middle = y / 2
    turned = f'fill="{GREY}" text-anchor="middle" transform="rotate(-90 18 {middle:g})"'
    parts.append(text(18, middle, 13, "imports go down only", turned))
    size = f'viewBox="0 0 {LEFT + WIDTH + 10} {y}" font-family="system-ui, sans-serif" role="img"'
    label = "<title>The layers of lightning_blip: each imports from the layers below it only</title>"
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', label, *parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("architecture.svg").write_text(picture(), encoding="utf-8")
