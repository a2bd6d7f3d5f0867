"""The head of a model card: the fields by which the Hub finds, runs and attributes a model."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import yaml

from dydit_cli.checkpoints.terms import OTHER, Terms
from dydit_cli.errors import DyditError

UNKNOWN = "unknown"

GIVEN = "--license"
"""Who said so, of a licence that the user named."""

NEAR = 0.85
"""Likeness to an identifier above which a name is taken for a slip."""

_IDENTIFIERS = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
    cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc intel-research lppl-1.3c ms-pl
    apple-ascl apple-amlr mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown
    other
"""

LICENSES = tuple(_IDENTIFIERS.split())
"""The identifiers that the Hub knows; a licence with another name is ``other`` with that name beside it."""


def chosen_terms(terms: Terms, given: str | None) -> Terms:
    """The licence of an export: the user's word, or that of the base model.

    Args:
        terms: Of the base model.
        given: As ``--license`` says it: an identifier, or the name of a licence that has none.

    Raises:
        DyditError: If it is nearly an identifier.
    """
    if given is None:
        return terms
    if given.lower() in LICENSES:
        return Terms(given.lower(), None, None, GIVEN, terms.repository)
    near = get_close_matches(given.lower(), LICENSES, n=1, cutoff=NEAR)
    if near:
        raise DyditError(
            f"'{given}' is no licence that the Hub knows.",
            why=f"It is nearly one that it knows, {near[0]}.",
            fix=f"did you mean '{near[0]}'? A licence with a name of its own is given by that name in full.",
        )
    return Terms(OTHER, given, None, GIVEN, terms.repository)


def front_matter(
    terms: Terms, tags: tuple[str, ...], fields: str = "", *, relation: str | None = "finetune"
) -> str:
    """The head of a card, with its lines of dashes.

    Args:
        terms: Licence and repository of the base model.
        tags: Of the model.
        fields: Lines of YAML that the format adds: ``library_name``, ``pipeline_tag``.
        relation: What the model is to its base.
    """
    said: dict[str, Any] = {}
    if terms.repository is not None:
        said["base_model"] = terms.repository
        if relation is not None:
            said["base_model_relation"] = relation
    said |= license_fields(terms)
    said |= yaml.safe_load(fields) or {}
    said["tags"] = list(tags)
    return f"---\n{yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def license_fields(terms: Terms) -> dict[str, str]:
    """The card's fields on a licence; an unknown one is said to be unknown."""
    if terms.license is None:
        return {"license": UNKNOWN}
    if terms.license.lower() in LICENSES and terms.license.lower() != OTHER:
        return {"license": terms.license.lower()}
    name = terms.name or (terms.license if terms.license.lower() != OTHER else None)
    found = {"license": OTHER}
    if name is not None:
        found["license_name"] = name
    if terms.link is not None:
        found["license_link"] = _absolute(terms.link, terms.repository)
    return found


def license_words(terms: Terms) -> str:
    """The licence in words, for the card's last section; empty if it is not known."""
    if terms.license is None or terms.license == UNKNOWN:
        return ""
    words = terms.name or terms.license
    return f"[{words}]({_absolute(terms.link, terms.repository)})" if terms.link else words


def _absolute(link: str, repository: str | None) -> str:
    """A link of a card that names a file beside it leads to that file of the base model's repository."""
    if "://" in link or repository is None:
        return link
    return f"https://huggingface.co/{repository}/blob/main/{link.lstrip('./')}"
