"""An audit for people: on a terminal in colours, elsewhere with marks; and its figure. Knows not how it is made."""

import io
import re
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from heliostat.data.audit import Finding, Report, Sample, SplitCounts
from heliostat.data.config import Severity

# Of a document, and of a finding: what is shown; the rest is said to be there.
SHOWN_SPANS = 12
SHOWN_CHARACTERS = 400
"""Of a span: its beginning and its end."""
SHOWN_ROWS = 5
SHOWN_LABELS = 12
STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}
# The marks of what is learned, where there are no colours.
OPEN, CLOSE = "⟦", "⟧"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_COLOURS = {"train": "#4C78A8", "validation": "#E45756", "test": "#54A24B"}


def show(report: Report, console: Console, *, samples: bool = True) -> None:
    """Print counts, findings and, if wanted, samples: learned tokens green on a terminal, else in ⟦brackets⟧."""
    coloured = console.color_system is not None and not console.no_color
    for part in _parts(report, coloured=coloured, samples=samples):
        console.print(part, soft_wrap=True)


def text(report: Report, console: Console | None = None) -> str:
    """What `show` would print on the console; without one, plain text."""
    target = console or Console(file=io.StringIO())
    with target.capture() as captured:
        show(report, target)
    return captured.get().rstrip("\n")


def _parts(report: Report, *, coloured: bool, samples: bool) -> Iterator[Text]:
    for split, counts in report.splits.items():
        yield Text("\n".join(_lines(split, counts)))
    for finding in report.findings:
        yield _finding(finding)
    if samples:
        learned = Text("green", "green") if coloured else Text(f"{OPEN}brackets{CLOSE}")
        if report.samples:
            yield Text.assemble("what is learned is in ", learned, ":")
        for sample in report.samples:
            yield _sample(sample, coloured=coloured)


def _lines(split: str, counts: SplitCounts) -> Iterator[str]:
    yield (
        f"{split}: {counts.rows:,} rows, {counts.documents:,} documents, {counts.tokens:,} tokens, "
        f"{counts.supervised_tokens:,} learned"
    )
    yield (
        f"  {counts.sequences:,} sequences, {counts.fill:.1%} full; {counts.truncated:,} documents truncated, "
        f"{counts.dropped:,} dropped; {counts.empty:,} rows empty, {counts.duplicates:,} duplicates"
    )
    if counts.eos_learned is not None:
        yield _eos(counts)
    yield f"  tokens of a document: {_statistics(counts.document_tokens)}"
    yield f"  learned of them: {_statistics(counts.learned_tokens)}"
    if counts.labels:
        shown = list(counts.labels.items())[:SHOWN_LABELS]
        shares = ", ".join(f"{label} {rows:,} ({rows / counts.rows:.1%})" for label, rows in shown)
        yield f"  labels: {_visible(shares)}{', ...' if len(counts.labels) > len(shown) else ''}"


def _eos(counts: SplitCounts) -> str:
    rest = "" if counts.eos_learned == counts.documents else " (the others were split or truncated at max_length)"
    return f"  EOS is learned at the end of {counts.eos_learned:,} of {counts.documents:,} documents{rest}"


def _statistics(values: Mapping[str, float]) -> str:
    return (
        f"{values['min']:,.0f} to {values['max']:,.0f}, median {values['median']:,.0f}, 95% up to {values['p95']:,.0f}"
    )


def _finding(finding: Finding) -> Text:
    line = Text.assemble((finding.severity, STYLES[finding.severity]), f"  {finding.check}: {finding.split}: ")
    line.append(_visible(finding.text))
    for place in finding.rows[:SHOWN_ROWS]:
        line.append(f"\n  {place}")
    if len(finding.rows) > SHOWN_ROWS:
        line.append("\n  ... (audit.json has more)")
    return line


def _sample(sample: Sample, *, coloured: bool) -> Text:
    shown = Text()
    shown.append(f"--- document {sample.document} of train, {sample.tokens:,} tokens\n", "bold" if coloured else "")
    for span in sample.spans[:SHOWN_SPANS]:
        part = _visible(_shortened(span.text))
        if coloured:
            shown.append(part, "green" if span.learned else "dim")
        else:
            shown.append(f"{OPEN}{part}{CLOSE}" if span.learned else part)
    if len(sample.spans) > SHOWN_SPANS:
        shown.append(" ...")
    return shown


def _shortened(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def _visible(text: str) -> str:
    """The text without what a terminal would take for a command, such as escape sequences."""
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def figure(report: Report, lengths: Mapping[str, npt.NDArray[np.integer]], max_length: int) -> Figure:
    """How long documents are, and how many rows each label has, where there are labels.

    Args:
        lengths: split -> tokens of each document, [documents].
    """
    labels = {split: counts.labels for split, counts in report.splits.items() if counts.labels}
    made = Figure(figsize=(14 if labels else 9, 5), layout="constrained")
    axes = made.subplots(1, 2 if labels else 1, squeeze=False)[0]
    _plot_lengths(axes[0], lengths, max_length)
    if labels:
        _plot_labels(axes[1], labels)
    return made


def _plot_lengths(axes: Axes, lengths: Mapping[str, npt.NDArray[np.integer]], max_length: int) -> None:
    edges = np.linspace(0, max(int(each.max()) for each in lengths.values()) + 1, 41)
    for split, each in lengths.items():
        parts = np.histogram(each, edges)[0] / len(each)
        label = f"{split} ({len(each):,} documents)"
        train = split == "train"
        axes.stairs(parts, edges, fill=train, alpha=0.35 if train else 1, lw=2, color=_COLOURS[split], label=label)
    if edges[-1] > 0.7 * max_length:
        axes.axvline(max_length, color="gray", linestyle="--", label=f"max_length {max_length:,}")
    axes.set_xlabel("tokens of a document", fontsize=11)
    axes.set_ylabel("part of the documents", fontsize=11)
    axes.legend(fontsize=10, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_labels(axes: Axes, labels: Mapping[str, Mapping[str, int]]) -> None:
    names = list(dict.fromkeys(name for counts in labels.values() for name in counts))[:SHOWN_LABELS]
    height = 0.8 / len(labels)
    for number, (split, counts) in enumerate(labels.items()):
        shares = [counts.get(name, 0) / sum(counts.values()) for name in names]
        axes.barh(np.arange(len(names)) + number * height, shares, height, color=_COLOURS[split], label=split)
    axes.set_yticks(np.arange(len(names)) + 0.4 - height / 2, [_visible(name).replace("$", r"\$") for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("part of the rows", fontsize=11)
    axes.legend(fontsize=10, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
