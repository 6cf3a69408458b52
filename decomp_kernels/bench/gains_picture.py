"""The headline table as an SVG by hand: the same file from the same results, on every machine.

    left: % over the frozen layer, with quartiles        right: peak MiB, the frozen layer's marked

Colours are for light and dark backgrounds; numbers stand beside the bars, so nothing hangs on them.
"""

from collections.abc import Sequence
from xml.sax.saxutils import escape

from decomp_kernels.bench.contenders import FORMULA, OURS, PEFT, PEFT_COMPILED
from decomp_kernels.bench.engine import FROZEN, Spread
from decomp_kernels.bench.gains import Gain

WIDTH, LABELS, GAP, VALUE, BAR, HEAD, FOOT = 860, 236, 14, 44, 12, 58, 26
COLORS = {OURS: "#2f6fb7", PEFT: "#d98026", FORMULA: "#a5734a", PEFT_COMPILED: "#8d8d8d"}
KINDS = {name: f"c{number}" for number, name in enumerate(COLORS)}
NAMES = {FORMULA: "the authors' formula, where PEFT lacks it"}


def picture(found: Sequence[Gain], title: str, source: str) -> str:
    """The SVG of the rows in ``found``.  title: what is measured; source: machine and date."""
    names = [name for name in COLORS if any(name in _spreads(gain) for gain in found)]
    slots = max(len(_spreads(gain)) for gain in found)
    row = BAR * slots + 10
    height = HEAD + row * len(found) + FOOT
    panel = (WIDTH - LABELS - 2 * GAP) / 2 - VALUE
    lefts = (LABELS, LABELS + panel + VALUE + GAP)
    most_time = max(_percent(s.q3) for gain in found for s in _spreads(gain).values())
    most_peak = max(gain.peaks[name] for gain in found for name in _spreads(gain))
    parts = [_text(GAP, 20, title, "start", "b"), *_legend(names)]
    for left, words in zip(lefts, ("time over the frozen layer, %", "peak, MiB"), strict=True):
        parts.append(_text(left, HEAD - 6, words, "start", "s"))
    for number, gain in enumerate(found):
        top = HEAD + number * row + 4
        middle = top + BAR * len(_spreads(gain)) / 2
        parts.append(_text(LABELS - 8, middle + 4, gain.label, "end"))
        frozen = lefts[1] + panel * gain.peaks[FROZEN] / most_peak
        for slot, (name, spread) in enumerate(_spreads(gain).items()):
            at = top + slot * BAR
            long = max(panel * _percent(spread.median) / most_time, 1.0)
            ends = [lefts[0] + panel * _percent(q) / most_time for q in (spread.q1, spread.q3)]
            parts.append(_bar(lefts[0], at, long, name))
            parts.append(
                f'<path class="w" d="M{ends[0]:.1f} {at + BAR / 2 - 1:.1f}H{ends[1]:.1f}"/>'
            )
            after = max(ends[1], lefts[0] + long) + 5
            parts.append(_text(after, at + BAR - 3, f"{_percent(spread.median):.0f}", "start", "s"))
            long = panel * gain.peaks[name] / most_peak
            parts.append(_bar(lefts[1], at, long, name))
            value = f"{gain.peaks[name]:.1f}"
            parts.append(_text(lefts[1] + long + 5, at + BAR - 3, value, "start", "s"))
        bottom = top + BAR * len(_spreads(gain))
        parts.append(f'<path class="f" d="M{frozen:.1f} {top - 2:.1f}V{bottom:.1f}"/>')
    parts.append(_text(GAP, height - 9, source, "start", "s"))
    body = "\n".join(parts)
    colors = "".join(f".{KINDS[name]}{{fill:{COLORS[name]}}}" for name in names)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"
  width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="13" role="img">
<title>{escape(title)}</title>
<style>text{{fill:#1c2430}}.s{{font-size:11px;fill:#55606e}}.b{{font-weight:bold}}{colors}
.w{{stroke:#1c2430;stroke-width:1}}.f{{stroke:#1c2430;stroke-width:1.5}}.k{{fill:#ffffff}}
@media (prefers-color-scheme:dark){{text{{fill:#e6e9ee}}.s{{fill:#a9b2bd}}.k{{fill:#14181d}}
.w,.f{{stroke:#e6e9ee}}}}</style>
<rect class="k" width="{WIDTH}" height="{height}"/>
{body}
</svg>
"""


def _spreads(gain: Gain) -> dict[str, Spread]:
    found = {OURS: gain.ours, gain.peer_is: gain.peer}
    return found if gain.compiled is None else found | {PEFT_COMPILED: gain.compiled}


def _percent(ratio: float) -> float:
    """What it costs over the frozen layer; a measured gain over it is no bar."""
    return max(100 * (ratio - 1), 0.0)


def _legend(names: Sequence[str]) -> list[str]:
    parts, left = [], float(LABELS)
    for name in names:
        parts.append(_bar(left, 28, 10, name))
        parts.append(_text(left + 14, 37, NAMES.get(name, name), "start", "s"))
        left += 26 + 6.2 * len(NAMES.get(name, name))
    parts.append(f'<path class="f" d="M{left + 4:.1f} 26V38"/>')
    parts.append(_text(left + 10, 37, "the frozen layer's peak", "start", "s"))
    return parts


def _bar(left: float, top: float, long: float, name: str) -> str:
    size = f'width="{long:.1f}" height="{BAR - 2}"'
    return f'<rect class="{KINDS[name]}" x="{left:.1f}" y="{top:.1f}" {size}/>'


def _text(left: float, base: float, words: str, anchor: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return (
        f'<text{style} x="{left:.1f}" y="{base:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
    )
