"""Text, tables and figures as Markdown and as HTML."""

import base64
import html
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Figure(NamedTuple):
    """A file under figures/ and what it shows."""

    name: str
    caption: str


Block = str | list[list[str]] | Figure  # a paragraph, or a heading after "## "; a table, its head first; a figure


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The blocks as Markdown."""

    def one(block: Block) -> str:
        if isinstance(block, Figure):
            return f"![{block.caption}](figures/{block.name}.png)\n\n{block.caption}"
        if isinstance(block, str):
            return block
        head, *rows = ["| " + " | ".join(row) + " |" for row in block]
        return "\n".join([head, "|" + "---|" * len(block[0]), *rows])

    return "\n\n".join([f"# {title}", *map(one, blocks)]) + "\n"


def page(folder: pathlib.Path, title: str, blocks: Sequence[Block]) -> str:
    """The blocks as one HTML file: figures, which are in `folder`, are inside."""

    def one(block: Block) -> str:
        if isinstance(block, Figure):
            data = base64.b64encode((folder / "figures" / f"{block.name}.png").read_bytes()).decode()
            caption = html.escape(block.caption)
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
        if isinstance(block, str):
            heading = block.removeprefix("## ")
            return f"<h2>{html.escape(heading)}</h2>" if heading != block else f"<p>{html.escape(block)}</p>"
        cells = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in _tagged(block)]
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"

    style = (
        "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}img{max-width:100%}"
        "td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}table{border-collapse:collapse}"
    )
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    return "\n".join([head, f"<h1>{html.escape(title)}</h1>", *map(one, blocks)]) + "\n"


def _tagged(rows: list[list[str]]) -> Iterator[tuple[str, list[str]]]:
    for index, row in enumerate(rows):
        yield ("td" if index else "th"), row
