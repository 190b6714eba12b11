"""Writes pickles opcode by opcode, and files of torch around them: also those that no pickler would write."""

import io
import struct
import zipfile

NONE, TRUE, FALSE, STOP, MARK, REDUCE, BUILD = b"N", b"\x88", b"\x89", b".", b"(", b"R", b"b"
EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE = b"}", b"]", b")"
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."


def program(*parts: bytes, protocol: int = 4) -> bytes:
    return bytes([0x80, protocol]) + b"".join(parts) + STOP


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def many(*items: bytes) -> bytes:
    return MARK + b"".join(items) + b"t"


def mapping(**items: bytes) -> bytes:
    return EMPTY_DICT + MARK + b"".join(text(key) + value for key, value in items.items()) + b"u"


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + many(*arguments) + REDUCE


def storage_id(kind="FloatStorage", key="0", numel=4, view=NONE, tag="storage") -> bytes:
    return many(text(tag), name("torch", kind), text(key), text("cuda:0"), number(numel), view) + b"Q"


def legacy(main=None, keys=("0",), numbers=None, little=TRUE, **storage) -> bytes:
    """A file in the old format: by default one storage of four float32."""
    main = program(storage_id(**storage)) if main is None else main
    system = program(mapping(little_endian=little, protocol_version=number(1001)), protocol=2)
    listed = program(EMPTY_LIST, MARK, *map(text, keys), b"e", protocol=2)
    numbers = struct.pack("<q4f", 4, 1, 2, 3, 4) if numbers is None else numbers
    return MAGIC + system + main + listed + numbers


def storage(**changes) -> bytes:
    return call("torch.storage", "_load_from_bytes", raw(legacy(**changes)))


def tensor(source=None, offset=0, size=(2, 2), stride=(2, 1), rest=None) -> bytes:
    """A tensor in a plain pickle; `source` is the program of its storage."""
    rest = FALSE + call("collections", "OrderedDict") if rest is None else rest
    layout = (many(*map(number, size)), many(*map(number, stride)))
    return call("torch._utils", "_rebuild_tensor_v2", source or storage(), number(offset), *layout, rest)


def persistent(class_name="EDMPrecond", version=6, source="exit(1)", state=EMPTY_DICT, **more) -> bytes:
    names = {"type": text("class"), "module_src": text(source), "class_name": text(class_name)}
    meta = mapping(version=number(version), state=state, **{**names, **more})
    return call("torch_utils.persistence", "_reconstruct_persistent_obj", meta)


def archive(main: bytes, members=None, compression=zipfile.ZIP_STORED, **more) -> bytes:
    """A file in the new format: by default one storage of four float32."""
    members = {"data/0": struct.pack("<4f", 1, 2, 3, 4)} if members is None else members
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for key, value in {"data.pkl": main, "byteorder": b"little", **members, **more}.items():
            file.writestr(f"archive/{key}", value)
    return buffer.getvalue()
