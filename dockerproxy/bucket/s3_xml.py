"""The XML of S3's responses. Pure.

An answer is an element with texts and lists in it, two levels deep. A document type is refused, so there are no
entities to expand; everything that lies deeper is skipped.
"""

from __future__ import annotations

from xml.parsers import expat

from attrs import define, field

_MAX_DEPTH = 16
_MAX_ITEMS = 20_000  # a page of a listing has at most 1,000 keys, and as many prefixes
_MAX_ELEMENTS = 200_000  # in all; they take 0.1 s


@define
class XMLAnswer:
    """An answer: the name of its root, the texts directly in it, and the elements with texts, without namespaces.

    The last of several texts with the same name counts.
    """

    root: str = ""
    texts: dict[str, str] = field(factory=dict)
    items: list[tuple[str, dict[str, str]]] = field(factory=list)

    @property
    def error(self) -> tuple[str, str] | None:
        """The code and the message, if the answer is an error, which may come with any status."""
        if self.root != "Error":
            return None
        return self.texts.get("Code", ""), self.texts.get("Message", "")


def parse_answer(content: bytes) -> XMLAnswer:
    """Parse an answer. Raise ValueError if it is not well-formed, has a document type, or is too deep or long."""
    answer = XMLAnswer()
    path: list[str] = []
    pieces: list[str] = []
    count = 0

    def start(name: str, attributes: object) -> None:
        nonlocal count
        count += 1
        path.append(name.rpartition(":")[2])
        pieces.clear()
        if len(path) > _MAX_DEPTH:
            raise ValueError("it is too deep")
        if count > _MAX_ELEMENTS:
            raise ValueError("it is too long")
        if len(path) == 2:
            answer.items.append((path[1], {}))
            if len(answer.items) > _MAX_ITEMS:
                raise ValueError("it is too long")

    def end(name: str) -> None:
        if len(path) == 1:
            answer.root = path[0]
        elif len(path) == 2 and not answer.items[-1][1]:
            answer.items.pop()
            answer.texts[path[1]] = "".join(pieces)
        elif len(path) == 3:
            answer.items[-1][1][path[2]] = "".join(pieces)
        path.pop()
        pieces.clear()

    def refuse(*_: object) -> None:
        raise ValueError("it has a document type")

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = pieces.append
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise ValueError(f"it is not XML ({expat.ErrorString(error.code)})") from None
    return answer
