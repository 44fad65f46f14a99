"""Speed of models side by side."""

from __future__ import annotations

from lowrank_kit.evaluation.bench import flat_rows
from lowrank_kit.report.page import Part, Table, Text
from lowrank_kit.summary.find import Found


def speed_parts(one: Found) -> list[Part]:
    """How it was measured, and a row for each model, batch size and mode."""
    document = one.document
    settings = document["settings"]
    lead = (
        f"Prompts of {settings['prompt']} tokens, {settings['new_tokens']} new ones; {settings['rounds']} rounds on "
        f"{settings['device']}, {document['threads']} threads. Speed, FLOPs and bytes over the first model's, speed "
        "as median, least and largest of the rounds."
    )
    return [Text(lead), Table(flat_rows(document))]
