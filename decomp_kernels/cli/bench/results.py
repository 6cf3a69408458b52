"""A suite's results file as it grows: written after each row, so that an early end keeps those that
are there, and gone on with by --resume.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from decomp_kernels.bench import record, suites
from decomp_kernels.cli.errors import BadInput


class Described(Protocol):
    """What a row is of."""

    @property
    def described(self) -> dict[str, Any]:
        """The first keys of its row, by which it is found again."""


T = TypeVar("T", bound=Described)


class Results:
    """The rows that there are, with the commit that each was measured at.

    Raises BadInput where --resume cannot go on with what is there.
    """

    def __init__(self, args: argparse.Namespace, protocol: dict[str, Any]) -> None:
        self.suite, self.path, self.protocol = args.suite, args.output, protocol
        self.rows = earlier_rows(args, protocol)

    def left(self, todo: Sequence[T], **also: Any) -> list[T]:
        """Those without a row.  also: what a row has beside what it is of."""
        names = {name for one in todo[:1] for name in one.described | also}
        known = {_text({name: row.get(name) for name in names}) for row in self.rows}
        return [one for one in todo if _text(one.described | also) not in known]

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row | {"commit": record.commit()})
        if self.path is not None:
            record.write(self.path, self.document())

    def document(self) -> dict[str, Any]:
        return record.document(self.suite, self.protocol, self.rows)


def earlier_rows(
    args: argparse.Namespace, protocol: dict[str, Any], free: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The rows that --resume keeps.  free: parts of the protocol that may differ."""
    if not args.resume:
        return []
    if args.output is None:
        raise BadInput("--resume needs --output FILE.json: the file whose rows are kept")
    if not args.output.exists():
        return []
    try:
        content = record.read(args.output, args.suite)
        suites.tables(content)  # its rows are of a kind that can be shown
        record.check_same_place(content, args.output)
    except ValueError as error:
        raise BadInput(str(error)) from None
    was, now = content["protocol"], json.loads(json.dumps(protocol))
    other = [name for name in sorted({*was, *now} - {*free}) if was.get(name) != now.get(name)]
    if other:
        raise BadInput(
            f"--resume needs the same protocol: {args.output} has {_said(was, other)}, asked for "
            f"is {_said(now, other)}; give the same options, or name another --output"
        )
    rows: list[dict[str, Any]] = content["rows"]
    return rows


def _text(described: dict[str, Any]) -> str:
    return json.dumps(described, sort_keys=True)


def _said(protocol: dict[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {protocol.get(name)}" for name in names)
