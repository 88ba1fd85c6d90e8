"""What was found in a corpus and what was left out of it: report.json and report.png."""

from collections import Counter, defaultdict

import numpy as np

from clean import REASONS, Filters, Signed
from pool import Encoded, Piece

LENGTH_BINS = 4  # of the documents' lengths, for each doubling
CHINESE_BINS = 50
SHOWN = 5  # examples of each reason
SHOWN_CHARACTERS = 120
REMEMBERED = 20_000  # documents whose beginning can be shown beside a copy of theirs
BAD_ROWS = 100  # that are listed


class Report:
    """Counts while a corpus is prepared, in memory that does not grow with it."""

    def __init__(self):
        self.sources = defaultdict(Counter)  # what became of a source's documents, and its characters
        self.lengths, self.chinese = np.zeros(128, np.int64), np.zeros(CHINESE_BINS, np.int64)
        self.examples, self.remembered = defaultdict(list), []
        self.bad_rows, self.bad_row_count = [], 0
        self.changed = Counter()

    def add_bad_row(self, place: str, error: Exception) -> None:
        self.bad_row_count += 1
        if len(self.bad_rows) < BAD_ROWS:
            self.bad_rows.append({"place": place, "reason": str(error)})

    def add_decided(self, piece: Piece, signed: Signed, fates: list[str], lines: dict, copies: dict) -> None:
        """What `Judge.decide` said of a piece."""
        logarithms = np.log2(np.maximum(signed.characters, 1)) * LENGTH_BINS
        self.lengths += np.bincount(logarithms.astype(int), minlength=128)
        bins = np.minimum(signed.chinese * CHINESE_BINS, CHINESE_BINS - 1).astype(int)
        self.chinese += np.bincount(bins, minlength=CHINESE_BINS)
        for number, fate in enumerate(fates):
            if fate in REASONS:
                self.show(fate, piece, number, copies.get(number))
            elif len(self.remembered) < REMEMBERED:
                self.remembered.append((piece.places[number], piece.beginnings[number]))
            if fate == "train" and signed.control[number]:
                self.changed["control characters"] += signed.control[number]
                self.changed["documents with control characters"] += 1
                self.show("control characters", piece, number, None)
            if number in lines:
                self.changed["boilerplate lines"] += len(lines[number])
                self.changed["documents with boilerplate lines"] += 1
                self.show("boilerplate lines", piece, number, None)

    def show(self, reason: str, piece: Piece, number: int, copy: tuple[int, float] | None) -> None:
        """Keeps the document as an example, if there are few of its kind."""
        if len(self.examples[reason]) < SHOWN:
            example = {"place": piece.places[number], "text": piece.beginnings[number]}
            if copy:
                example["similarity"] = round(copy[1], 3)
            if copy and copy[0] < len(self.remembered):
                example["copy_of"] = dict(zip(("place", "text"), self.remembered[copy[0]], strict=True))
            self.examples[reason].append(example)

    def add_written(self, piece: Piece, sides: dict[str, Encoded], fates: list[str]) -> None:
        counts = self.sources[piece.source]
        counts.update(fates)
        counts["characters_read"] += piece.characters

    def kept(self, side: str) -> int:
        return sum(counts[side] for counts in self.sources.values())

    def progress(self, seconds: float) -> str:
        characters = sum(counts["characters_read"] for counts in self.sources.values())
        documents = sum(counts[fate] for counts in self.sources.values() for fate in ("train", "validation", *REASONS))
        return f"{documents:,} documents, {characters:,} characters, {characters / seconds:,.0f} a second"

    def dropped(self) -> dict[str, int]:
        """Documents left out, by reason."""
        return {reason: sum(counts[reason] for counts in self.sources.values()) for reason in REASONS}

    def explain(self) -> str:
        """Why no document is left."""
        reasons = [f"{reason}: {count}" for reason, count in self.dropped().items() if count]
        reasons += [f"bad records: {self.bad_row_count}"] * bool(self.bad_row_count)
        return f"Left out: {', '.join(reasons)}." if reasons else "The files hold no text."

    def finish(self, manifests: dict[str, dict], unread: list[str], seconds: float) -> dict:
        """What report.json holds."""
        tokens = {
            side: {source: counts["tokens"] for source, counts in manifest["sources"].items()}
            for side, manifest in manifests.items()
        }
        edges = np.flatnonzero(self.lengths)
        return {
            "documents": {"train": self.kept("train"), "validation": self.kept("validation")},
            "dropped": self.dropped(),
            "changed": dict(self.changed),
            "sources": {
                source: {name: count for name, count in counts.items() if count}
                | {f"{side}_tokens": own[source] for side, own in tokens.items() if source in own}
                for source, counts in self.sources.items()
            },
            "lengths": {str(round(2 ** (edge / LENGTH_BINS))): int(self.lengths[edge]) for edge in edges},
            "share_of_chinese": self.chinese.tolist(),
            "examples": dict(self.examples),
            "bad_rows": self.bad_row_count,
            "first_bad_rows": self.bad_rows,
            "files_not_read": unread[:BAD_ROWS],
            "seconds": round(seconds, 1),
        }


def summarize(report: dict) -> str:
    """A report on one screen."""
    lines = [f"{side:<11} {count:,} documents" for side, count in report["documents"].items()]
    lines += [
        f"  {source}: "
        + ", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in sorted(counts) if name.endswith("tokens"))
        for source, counts in report["sources"].items()
    ]
    notes = {f"left out ({reason})": count for reason, count in report["dropped"].items()}
    notes |= {f"taken out ({what})": count for what, count in report["changed"].items() if "documents" not in what}
    notes |= {"bad records": report["bad_rows"], "files not read": len(report["files_not_read"])}
    return "\n".join([*lines, *(f"{count:>11,} {what}" for what, count in notes.items() if count)])


def plot(report: dict, filters: Filters):
    """Lengths, shares of Chinese, what became of the documents, and tokens by source, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    lengths, chinese, fates, sources = figure.subplots(2, 2).flat
    edges = [int(edge) for edge in report["lengths"]]
    widths = [edge * (2 ** (1 / LENGTH_BINS) - 1) for edge in edges]
    lengths.bar(edges, report["lengths"].values(), widths, align="edge")
    lengths.set(title="length", xlabel="characters", ylabel="documents", xscale="log")
    places = np.arange(CHINESE_BINS) / CHINESE_BINS
    chinese.bar(places, report["share_of_chinese"], 1 / CHINESE_BINS, align="edge")
    chinese.axvline(filters.min_chinese, color="black", linestyle=":")
    chinese.set(title="share of Chinese characters", xlabel="share", ylabel="documents", yscale="symlog")
    counts = report["documents"] | report["dropped"]
    fates.barh(list(counts), list(counts.values()))
    fates.bar_label(fates.containers[0], fmt="{:,.0f}", padding=3)
    fates.set(title="documents", xscale="symlog")
    fates.margins(x=0.2)
    fates.invert_yaxis()
    tokens = {source: counts.get("train_tokens", 0) for source, counts in report["sources"].items()}
    largest = sorted(tokens, key=tokens.get, reverse=True)[:12]
    names = [source.encode("ascii", "backslashreplace").decode() for source in largest]
    sources.barh(names, [tokens[source] for source in largest])
    sources.bar_label(sources.containers[0], fmt="{:,.0f}", padding=3)
    sources.set(title="training tokens by source" + " (12 largest)" * (len(tokens) > 12))
    sources.margins(x=0.2)
    sources.invert_yaxis()
    return figure
