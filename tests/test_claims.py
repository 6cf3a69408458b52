"""No sentence claims a speed or a memory that no results file shows.

Documents and docstrings are read as paragraphs.  Left out are fenced code, the blocks and figures
that scripts/generate_tables.py writes, the log of what was tried, and predictions.
In what remains

- a figure beside a word of speed or memory is an error: the generator writes figures;
- a comparison without a figure ("faster than PEFT") needs, in its section, a block, a figure or a
  link to a results file.  Docstrings, which have no sections, compare nothing with PEFT or with a
  frozen layer; that one way of ours is cheaper than another is design, and may be said there.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
MODULES = sorted((ROOT / "decomp_kernels").rglob("*.py"))
# Sections of experiments and predictions, which say that they are no more.
EXEMPT = {
    "docs/performance.md": {"What was tried", "On a GPU: what to expect, nothing measured"},
}
# A number, and the words beside which it claims a speed or a memory.
SPEED = (
    r"\b(faster|slower|speeds?|speed-?ups?|overhead|cheaper|costs?|longer|frozen|takes? \d"
    r"|throughput)"
)
NEEDS = r"(takes?|took|costs?|needs?|saves?|adds?|in|is)"
SECONDS = r"(ms|µs|us|microseconds|milliseconds|seconds|minutes)"
CLAIMS = [
    (r"\d\s?(%|percent\b)", rf"{SPEED}|\b(peak|memory|of (the|its|PEFT's) (time|step))\b"),
    (r"\d\s?(×|x as\b|times\b|-fold\b)|\dx\b", rf"{SPEED}|\b(fast|slow|memory|peak|time|PEFT)\b"),
    (rf"\b{NEEDS}( about| some| only| just)? \d[\d.]*\s?{SECONDS}\b", r""),
    (rf"\b(step|pass|call|forward|backward) (of|in|at|needs) \d[\d.]*\s?{SECONDS}\b", r""),
    (r"\d\s?(tokens (per|a) second|tokens/s|[GT]FLOP/s|[GT]B/s)", r""),
    (r"\d\s?([KMG]i?B)\b", r"\b(peak|PEFT'?s?|less|more|saves?)\b"),
    (r"(?<![\w.^-])(?!0\.0)\d\.\d\d?(?![\w.])", r"\b(faster|slower|PEFT'?s?|frozen|peak)\b"),
]
NO_CLAIM = re.compile(  # versions, the width of an interval, the whole of a share
    r"\bPEFT( of| before)? 0\.[12]\d[\d.]*( (and|to|or) 0\.[12]\d[\d.]*)*"
    r"|\b(torch|PyTorch|Python|Triton|transformers|bitsandbytes|torchao|NumPy) v?\d[\d.]*"
    r"|\d\d % (bootstrap )?interval|interval \(\d\d %\)|has 100 %"
)
SHARE = r"(half|thirds?|a quarter|a fifth|a tenth|an eighth|twice|double)"
COMPARED = re.compile(
    r"\b((fast|cheap|quick)(er|est)|slower)\b|\b(less|more|lower) (peak )?memory\b"
    r"|\bas (fast|slow|cheap|quick) as\b|\b(twice|times|half) as (fast|slow|cheap|quick|long)\b"
    r"|\b(outperform|beat)(s|en)?\b|\b(almost|nearly|practically) (free|nothing)\b"
    r"|\b(halves?|doubles?) (PEFT's|the frozen|its|the) (memory|time|peak|speed|step)\b"
    rf"|\b{SHARE}( of)? (PEFT's|the frozen|its|the|as much) ?(memory|time|peak|speed|step)\b"
    rf"|\b{SHARE} of PEFT's",
    re.IGNORECASE,
)
CONDITION = re.compile(  # "where it was measured faster" says nothing of where that is
    r"\b(where(ver)?|whether|unless|how much|if)\b[^.;]* (faster|slower|cheaper)", re.IGNORECASE
)
RESULT = re.compile(r"benchmarks/results/|<!-- (results|figure): ")
GENERATED = [
    re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL),
    re.compile(r"(?<=-->\n).*?(?=<!-- end of results -->)", re.DOTALL),
    re.compile(r"(?<=-->)[^<]*(?=<!-- end -->)"),
    re.compile(r"`[^`\n]+`"),
]


def sections(text):
    """(headings from the outermost, text) of each section."""
    found, path = [([], "")], []
    for line in text.splitlines():
        heading = re.match(r"(#+) (.*)", line)
        if heading:
            path = [*path[: len(heading[1]) - 1], heading[2]]
            found.append((list(path), ""))
        else:
            headings, before = found[-1]
            found[-1] = (headings, f"{before}{line}\n")
    return found


def hand_written(text):
    for pattern in GENERATED:
        text = pattern.sub(" ", text)
    return text


def unproven(text, exempt=frozenset()):
    """Every claim of the text that nothing shows."""
    found = []
    plain = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for headings, body in sections(plain):
        if set(headings) & exempt:
            continue
        shown = RESULT.search(body)
        for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-|*] )", hand_written(body)):
            for sentence in re.split(
                r"(?<=[.!?;:])\s+(?=[A-Z*(])| \| ", " ".join(paragraph.split())
            ):
                claim = NO_CLAIM.sub(" ", sentence)
                if any(re.search(n, claim) and re.search(w, claim, re.I) for n, w in CLAIMS):
                    found.append(f"a figure by hand: {sentence}")
                elif COMPARED.search(CONDITION.sub(" ", sentence)) and not shown:
                    found.append(f"a comparison without results: {sentence}")
    return found


def docstrings(path):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [
        node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, kinds)
    ]
    return "\n\n".join(ast.get_docstring(node) or "" for node in nodes)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_claim_what_results_show(path):
    name = path.relative_to(ROOT).as_posix()
    assert unproven(path.read_text("utf-8"), EXEMPT.get(name, set())) == []


def test_docstrings_claim_what_results_show():
    found = [
        f"{path.relative_to(ROOT).as_posix()}: {claim}"
        for path in MODULES
        for claim in unproven(docstrings(path))
        if claim.startswith("a figure") or re.search(r"\bPEFT|\bfrozen", claim)
    ]
    assert found == []


def test_exempt_sections_are_there():
    for name, exempt in EXEMPT.items():
        assert exempt <= set(
            re.findall(r"^#+ (.*)$", (ROOT / name).read_text("utf-8"), re.MULTILINE)
        )


@pytest.mark.parametrize(
    "claim",
    [
        "LoRA is 1.3 times faster than PEFT's.",
        "DoRA costs 15 % over the frozen layer.",
        "It needs half of PEFT's memory.",
        "A step takes 9 ms.",
        "A speed-up of 2×.",
        "The peak is 8.4 MiB, PEFT's 34.1 MiB.",
        "LoRA in bf16 is slower than PEFT's (1.33, 1.27).",
        "DoRA is faster than\nPEFT's on every layer.",
        "- dropout adds 0.26 to PEFT's step",
        "| lora | 1.09 | PEFT 1.15 |",
        "DoRA is twice as fast on a GPU.",
        "It beats PEFT on every layer.",
        "The fastest LoRA there is.",
        "It cuts peak memory by 4x.",
        "Throughput grows by 40 %.",
        "A step of 42 ms.",
        "It trains 1,200 tokens per second.",
        "The peak is a tenth of PEFT's.",
        "It halves the peak.",
        "The adapter is nearly free.",
        "It saves 20 GB on a model of 70 billion parameters.",
        "## What it costs\n\nDoRA: 15 percent over the frozen linear.",
    ],
)
def test_planted_claims_are_found(claim):
    assert len(unproven(f"# Head\n\nSome words.\n\n{claim}\n\nMore words.")) == 1


@pytest.mark.parametrize(
    "words",
    [
        "PEFT 0.21.2 and torch 2.13 compute the same.",
        "`auto` takes them where they were measured to be faster.",
        "Gains come with a 95 % bootstrap interval over the frozen model.",
        "Errors are at most twice those of PEFT; r = 16 and alpha = 32.",
        "```text\n9 ms, 2 times faster than PEFT\n```",
        "It took <!-- figure: cpu/a.json; lora; ours -->1.09<!-- end --> of the frozen one's time.",
        "<!-- results: cpu/a.json -->\n\nfaster than PEFT, 1.09 times\n\n<!-- end of results -->",
        "DoRA is faster than PEFT's: [here](../benchmarks/results/cpu/layer.json).",
    ],
)
def test_words_that_claim_nothing_or_show_it_pass(words):
    assert unproven(f"# Head\n\n{words}\n") == []


def test_a_log_is_exempt_with_its_subsections_and_nothing_after_it():
    text = "# A\n\n## Tried\n\n### Once\n\nIt took 9 ms.\n\n## Then\n\nIt took 9 ms.\n"
    assert len(unproven(text)) == 2
    assert len(unproven(text, {"Tried"})) == 1
