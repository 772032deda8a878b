"""Write a listing as ``cuobjdump -sass`` prints it, with control bits."""


def listing(*lines: str, entry: str = "kernel") -> str:
    """Return the listing of instructions ``[predicate] NAME operands [| control]``.

    ``control`` has words like ``stall=4 write=0 read=1 wait=0b11``; by default a stall of one and
    no scoreboards. Instruction n is at address 16·n.
    """
    text = [f"\t\tFunction : {entry}"]
    for n, line in enumerate(lines):
        code, _, control = line.partition("|")
        bits = {"stall": 1, "write": 7, "read": 7, "wait": 0}
        bits |= {key: int(value, 0) for key, value in (w.split("=") for w in control.split())}
        word = bits["stall"] | bits["write"] << 5 | bits["read"] << 8 | bits["wait"] << 11
        text.append(f"        /*{16 * n:04x}*/  {code.strip()} ;  /* 0x{0:016x} */")
        text.append(f"  /* 0x{word << 41:016x} */")
    return "\n".join(text)
