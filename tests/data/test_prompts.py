"""Files of prompts."""

import pytest

from prfl_fast.data.prompts import Prompt, read_prompts


def test_each_kind_of_file_gives_the_same_prompts(tmp_path):
    (tmp_path / "a.png").touch()
    image = tmp_path / "a.png"
    files = {
        "p.txt": 'A disc, "red"\n\n  A ring\n',
        "p.csv": 'prompt,image\n"A disc, ""red""",\nA ring,a.png\n',
        "p.jsonl": '{"prompt": "A disc, \\"red\\""}\n{"prompt": "A ring", "image": "a.png"}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        found = read_prompts(tmp_path / name)
        given = None if name == "p.txt" else image
        assert found == [Prompt('A disc, "red"'), Prompt("A ring", given)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.md", "x", "expected a file of .txt, .csv, .jsonl"),
        ("p.txt", "\n \n", "p.txt is 'empty', expected at least one prompt"),
        ("p.csv", "text\nx\n", "p.csv:2 is"),
        ("p.jsonl", '{"prompt": "x", "images": "y"}\n', "only image, last_image"),
        ("p.jsonl", '{"prompt": 3}\n', "expected strings under prompt"),
        ("p.jsonl", "{\n", "p.jsonl:1: not JSON"),
        ("p.jsonl", '{"prompt": "x", "image": "no.png"}\n', "expected a file that exists"),
        ("p.jsonl", '{"prompt": "x", "last_image": "p.jsonl"}\n', "expected one beside last_image"),
    ],
)
def test_a_bad_file_is_refused_by_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name) as error:
        read_prompts(tmp_path / name)
    assert message in str(error.value)
