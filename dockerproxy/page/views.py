"""The values that the templates show, made of the documents of the API (`dockerproxy.admin.overview`). Pure.

The documents are for one viewer already: they have no name that he may not see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

from attrs import frozen

from dockerproxy.oci.docker_hub import short_name
from dockerproxy.page import words
from dockerproxy.page.charts import RANGES, sparkline

Document = Mapping[str, Any]

RANGE_TEXTS = {
    "1h": "1 hour",
    "6h": "6 hours",
    "24h": "24 hours",
    "7d": "7 days",
    "30d": "30 days",
    "1y": "1 year",
}
_MAX_BARS = 100
_MAX_ANNOTATIONS = 20
_MAX_TRANSFERS = 100
_IMAGE_LABEL = "org.opencontainers.image."  # which most annotations begin with
_IMAGE_CONFIGS = ("application/vnd.oci.image.config.", "application/vnd.docker.container.image.")
_MIN_BAR = 0.8  # percent of the width, so that a small layer is seen


def numbers(overview: Document) -> dict[str, Any]:
    """Return the four numbers at the top of an `overview` document."""
    day, total, cache = overview["day"], overview["total"], overview["cache"]
    return {
        "range": RANGE_TEXTS[overview["range"]],
        "ratio": day["ratio"],
        "served": day["served"],
        "saved": _amount(day["saved"]),
        "saved_in_all": total["saved"],
        "since": None if total["since"] is None else words.date(total["since"]),
        "cache": _amount(cache["bytes"]),
        "cache_limit": cache["limit"],
        "cache_ratio": _ratio(cache["bytes"], cache["limit"]) or 0.0,
        "idle_age": None if cache["idle_age"] is None else words.days(cache["idle_age"]),
    }


def budget_card(limits: Sequence[Document], now: float) -> dict[str, Any]:
    """Return the card of the budget that is nearest to its end, of those that a registry has told."""
    known = [limit for limit in limits if limit["limit"] is not None and limit["remaining"] is not None]
    if not known:
        return {"title": "Rate budget", "left": words.NOTHING, "unit": "", "ratio": None,
                "text": "no registry has named a limit yet"}  # fmt: skip
    limit = min(known, key=lambda limit: _ratio(limit["remaining"], limit["limit"]) or 0.0)
    name = "Docker Hub" if limit["registry"] == "docker.io" else words.shortened(limit["registry"], 60)
    return {"title": f"{name} budget", **budget(limit, now)}


def budget(limit: Document, now: float) -> dict[str, Any]:
    """Return the sentence of a LIMIT document."""
    refused_until, gone_in = limit["refused_until"], limit.get("gone_in")
    parts = [f"per {words.span(limit['window'])}"] if limit["window"] else []
    if refused_until is not None and refused_until > now:
        parts.append(f"used up until {words.clock(now, refused_until)}")
    elif gone_in is not None:
        parts.append(f"gone in about {words.span(gone_in)} at this rate")
    remaining, top = limit["remaining"], limit["limit"]
    return {
        "left": words.count(remaining),
        "unit": f"of {words.count(top)} pulls left",
        "ratio": _ratio(remaining, top),
        "text": " · ".join(parts) or "pulls left",
        "who": limit.get("login") or limit.get("source") or "",
        "top": list(limit.get("top") or ())[:10],
    }


def registries(documents: Iterable[Document], now: float) -> list[dict[str, Any]]:
    """Return the rows of the table of registries."""
    return [registry(document, now) for document in documents]


def fleet(document: Document | None) -> Document | None:
    """Return the members of a `registries` document with a level for each, None without FLEET."""
    if document is None:
        return None
    texts = {"me": "this member", "up": "up"}
    members = [
        {
            "name": member["name"],
            "level": "ok" if member["state"] in texts else "bad",
            "text": texts.get(member["state"], "down: " + member["state"]),
        }
        for member in document["members"]
    ]
    return {**document, "members": members}


def registry(document: Document, now: float) -> dict[str, Any]:
    """Return the row of a REGISTRY document."""
    is_hosted = document["kind"] == "hosted"
    limit = document["budget"]
    known_budget = None
    if limit is not None and limit["limit"] is not None and limit["remaining"] is not None:
        shown = budget(limit, now)
        known_budget = {"ratio": shown["ratio"] or 0.0, "text": f"{shown['left']} {shown['unit']}"}
    level, state = _registry_state(document, is_hosted)
    return {
        "name": document["name"],
        "path": document["name"],
        "level": level,
        "state": state,
        "problem": document["problem"] or ("hosted here" if is_hosted else ""),
        "requests": document["requests"],
        "from_cache": None if is_hosted else document["ratio"],
        "served": document["served"],
        "downloaded": None if is_hosted else document["downloaded"],
        "p50": document["p50"],
        "p95": document["p95"],
        "errors": document["errors"],
        "stale": document["stale"],
        "budget": known_budget,
        "color": {"bad": "bad", "own": "own"}.get(level, "cache"),
        "sparkline": sparkline(document["sparkline"]),
    }


def _registry_state(document: Document, is_hosted: bool) -> tuple[str, str]:
    if is_hosted:
        return "own", "hosted here"
    if document["up"] is False:
        return "bad", "does not answer"
    if document["problem"]:
        return "warn", "warning"
    return ("ok", "answers") if document["up"] else ("idle", "not asked yet")


def transfers(documents: Sequence[Document], now: float) -> dict[str, Any]:
    """Return the table of downloads under way, of TRANSFER documents."""
    readers = sum(document["readers"] for document in documents)
    total = f"{words.counted(len(documents), 'download')} for {words.counted(readers, 'client')}"
    return {"sum": total if documents else "", "rows": [_transfer(each, now) for each in documents[:_MAX_TRANSFERS]]}


def _transfer(document: Document, now: float) -> dict[str, Any]:
    size, done = document["size"], document["done"]
    elapsed = now - document["started"]
    rate = document["rate"] or (done / elapsed if elapsed >= 1 else None)
    part = [_layer(document), document["platform"]]
    return {
        "id": document["id"],
        "name": words.shortened(transfer_name(document), 200),
        "part": words.shortened(", ".join(filter(None, part)), 200) or f"since {words.clock(now, document['started'])}",
        "ratio": _ratio(done, size) or 0.0,
        "amount": words.size(done) if size is None else f"{words.size(done)} of {words.size(size)}",
        "rate": words.rate(rate) if rate else "",
        "left": words.span((size - done) / rate) if rate and size is not None else "",
        "readers": words.counted(document["readers"], "client"),
    }


def transfer_name(document: Document) -> str:
    """Return the name of the image that a TRANSFER document is of, with its tag if it is known."""
    return f"{document['name']}:{document['tag']}" if document["tag"] else str(document["name"])


def _layer(document: Document) -> str | None:
    return f"layer {document['layer']} of {document['layers']}" if document["layer"] and document["layers"] else None


def image_list(document: Document, where: str, per_page: int) -> dict[str, Any]:
    """Return the list of images of an `images` document, with the links to its other pages and orders."""
    page, pages = document["page"], document["pages"]
    state = {"q": document["q"], "where": where, "sort": document["sort"], "order": document["order"]}

    def link(**changes: object) -> str:
        query = {name: value for name, value in {**state, **changes}.items() if value not in ("", 1)}
        return f"/images?{urlencode(query)}" if query else "/images"

    def sort_link(name: str) -> str:
        default = "asc" if name == "name" else "desc"
        opposite = "asc" if document["order"] == "desc" else "desc"
        return link(sort=name, order=opposite if document["sort"] == name else default)

    shown = len(document["images"])
    return {
        **state,
        "images": document["images"],
        "count": document["count"],
        "bytes": document["bytes"],
        "complete": document["complete"],
        "first": (page - 1) * per_page + 1 if shown else 0,
        "last": (page - 1) * per_page + shown,
        "links": {
            "sort": {name: sort_link(name) for name in ("name", "size", "pulls", "used")},
            "where": {name: link(where=name) for name in ("", "cached", "hosted", "pinned")},
            "previous": link(page=page - 1) if page > 1 else None,
            "next": link(page=page + 1) if page < pages else None,
        },
    }


def chosen_reference(document: Document, wanted: str | None) -> str | None:
    """Return the tag or digest to show: the `wanted` one, else latest, else the first. None if there is none."""
    tags = document["tags"]
    if wanted is not None:
        return wanted
    names = [tag["tag"] or tag["digest"] for tag in tags]
    return "latest" if "latest" in names else next(iter(names), None)


def split_image(name: str) -> tuple[str, str]:
    """Return the repository, and the tag or the digest, in the full name of an image."""
    repository, at, digest = name.partition("@")
    if at:
        return repository, digest
    repository, colon, tag = name.rpartition(":")
    return (repository, tag) if colon and "/" not in tag else (name, "")


def confirm_removal(image: Document, tag: Document) -> dict[str, Any]:
    """Return the question whether a tag or manifest is to be removed."""
    reference = tag["tag"] or tag["digest"]
    name = f"{image['name']}{':' if tag['tag'] else '@'}{reference}"
    text = (
        "The next pull fetches it again, if the registry still has it."
        if image["where"] == "cached"
        else "It was pushed here, and cannot be had again from elsewhere."
    )
    fields = {"name": name, "where": image["where"]}
    return {
        "name": name,
        "text": text,
        "fields": fields,
        "back": image_path(image["name"], image["where"], tag=reference),
    }


def image_path(name: str, where: str, **query: object) -> str:
    """Return the path of the page of an image."""
    values = {"where": "hosted"} if where == "hosted" else {}
    values |= {key: str(value) for key, value in query.items() if value not in (None, "")}
    return f"/images/{quote(name, errors='replace')}" + (f"?{urlencode(values, errors='replace')}" if values else "")


@frozen
class ShownManifest:
    """The `manifest` document of a tag, and the one with its `content`: of the `platform` if it is an index."""

    manifest: Document
    content: Document
    platform: str | None


def chosen_platform(platforms: Sequence[Document], wanted: str | None) -> Document | None:
    """Return the part of an index to show: the `wanted` platform, else one that is here. None if it is no index."""
    named = [part for part in platforms if part["platform"] == wanted]
    present = [part for part in platforms if part["present"]]
    usual = [part for part in present if part["platform"] == "linux/amd64"]
    return next(iter([*named, *usual, *present, *platforms]), None)


def pull_command(image: Document, own_name: str) -> str:
    """Return the command that pulls an image, up to its tag. `own_name` is that of the hosted registry."""
    if image["where"] == "hosted":
        return f"docker pull {own_name}/{image['name']}"
    return f"docker pull {short_name(image['name'])}"


def image(
    document: Document,
    shown: ShownManifest | None,
    reference: str | None,
    pull: str,
    now: float,
) -> dict[str, Any]:
    """Return the page of an `image` document. `reference` is the tag or the digest of the manifest that is `shown`.

    `pull` is the command that pulls the image, up to its tag.
    """
    image = document["image"]
    where = image["where"]
    *parents, name = image["name"].split("/")
    crumbs = [
        {"text": parent, "prefix": "/".join(parents[: number + 1]) + "/"} for number, parent in enumerate(parents)
    ]
    tags = [_tag(tag, image, reference, now) for tag in document["tags"]]
    selected = next((tag for tag in tags if tag["selected"]), None)
    page, pages = document["page"], document["pages"]
    return {
        "image": image,
        "name": name,
        "crumbs": crumbs,
        "tags": tags,
        "page": page,
        "pages": pages,
        "links": {
            "previous": image_path(image["name"], where, page=page - 1) if page > 1 else None,
            "next": image_path(image["name"], where, page=page + 1) if page < pages else None,
        },
        "selected": None if selected is None else _selected(image, selected, shown, pull),
    }


def _tag(tag: Document, image: Document, reference: str | None, now: float) -> dict[str, Any]:
    own_reference = tag["tag"] or tag["digest"]
    name, where = image["name"], image["where"]
    separator = ":" if tag["tag"] else "@"
    checked = tag["checked"]
    return {
        **tag,
        "kind": _kind(tag),
        "selected": own_reference == reference,
        "pinned": tag.get("pinned", False),
        "freshness": "" if checked is None else f"checked {words.age(now, checked)}",
        "link": image_path(name, where, tag=own_reference),
        "remove_link": image_path(name, where, tag=own_reference, confirm="remove"),
        "fields": {"name": f"{name}{separator}{own_reference}", "where": where},
    }


def _kind(tag: Document) -> str:
    media_type = tag["media_type"] or ""
    if "index" in media_type or "manifest.list" in media_type:
        return "index"
    return "image"


def _selected(image: Document, tag: Document, shown: ShownManifest | None, pull: str) -> dict[str, Any]:
    reference = tag["tag"] or tag["digest"]
    where = image["where"]
    artifact_type = "" if shown is None else shown.content["artifact_type"] or ""
    if artifact_type.startswith(_IMAGE_CONFIGS):
        artifact_type = ""
    command = "" if artifact_type else f"{pull}{':' if tag['tag'] else '@'}{reference}"
    selected: dict[str, Any] = {
        "title": tag["tag"] or words.short_digest(tag["digest"]),
        "pull": command,
        "digest": tag["digest"],
        "kind": "artifact" if artifact_type else tag["kind"],
        "media_type": artifact_type or tag["media_type"],
        "freshness": tag["freshness"],
        "readable_by": _readable_by(image, tag),
        "platforms": [],
        "platform": None,
        "layers": None,
        "annotations": [],
    }
    if shown is not None:
        selected["platform"] = shown.platform
        selected["platforms"] = [
            {
                "name": each["platform"],
                "present": each["present"],
                "selected": each["platform"] == shown.platform,
                "link": image_path(image["name"], where, tag=reference, platform=each["platform"]),
            }
            for each in shown.manifest["platforms"]
        ]
        selected["layers"] = layers(shown.content["layers"]) if shown.content["layers"] else None
        annotations = {**shown.content["annotations"], **shown.manifest["annotations"]}
        selected["annotations"] = [
            {"name": name.removeprefix(_IMAGE_LABEL), "value": value}
            for name, value in list(annotations.items())[:_MAX_ANNOTATIONS]
        ]
    return selected


def _readable_by(image: Document, tag: Document) -> str:
    if image["where"] == "hosted":
        return "everybody who may read this registry"
    return "clients whose login the registry accepts for it" if image["private"] or tag["private"] else "everybody"


def layers(documents: Sequence[Document]) -> dict[str, Any]:
    """Return the bar of an image's layers, with positions in percent of its width."""
    total = sum(layer["size"] for layer in documents)
    shown = documents[:_MAX_BARS]
    room = 100.0 - _MIN_BAR * len(shown)
    bars, x = [], 0.0
    for layer in shown:
        width = _MIN_BAR + room * (layer["size"] / total if total else 1 / len(shown))
        state = "here" if layer["present"] else "absent"
        bars.append(
            {
                "x": f"{x:.2f}",
                "width": f"{max(0.1, width - 0.3):.2f}",
                "state": state,
                "text": words.size(layer["size"])
                + ("" if layer["present"] else ", not here: it is fetched when somebody asks for it"),
            }
        )
        x += width
    return {
        "bars": bars,
        "count": len(documents),
        "here": sum(bool(layer["present"]) for layer in documents),
        "size": total,
    }


def report(document: Document, now: float) -> dict[str, Any]:
    """Return the report of a health document."""
    return {"findings": document["findings"], "checked": f"checked {words.age(now, document['at'])}"}


def reason(row: Document, now: float) -> dict[str, str]:
    """Return a row of the history of pulls: a request, and why it was answered as it was."""
    is_blobs = row["kind"] == "blob"
    size = words.size(row["bytes"])
    moment = datetime.fromisoformat(row["time"].replace("Z", "+00:00")).timestamp()
    return {
        "when": words.clock(now, moment),
        "client": row["client"] if row["user"] is None else f"{row['user']} at {row['client']}",
        "what": f"{words.counted(row['blobs'], 'layer')}, {size}" if is_blobs else f"manifest {row['reference']}",
        "verdict": row["verdict"] if row["status"] < 400 else str(row["status"]),
        "because": row["explanation"],
    }


def operation(document: Document | None, now: float) -> dict[str, Any] | None:
    """Return the running operation of a `status` document, None if there is none."""
    if document is None:
        return None
    return {"name": document["name"], "user": document["user"], "since": words.clock(now, document["since"])}


def started(timestamp: float) -> str:
    """Return the day on which the daemon started."""
    return words.date(timestamp)


def range_of(text: str) -> str:
    """Return the name of a range of time, the default one for an unknown name."""
    return text if text in RANGES else "24h"


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else min(1.0, max(0.0, part / whole))


def _amount(number: float) -> dict[str, str]:
    amount, _, unit = words.size(number).partition(" ")
    return {"amount": amount, "unit": unit}
