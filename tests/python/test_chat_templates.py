"""The cases that the router's own test compares with are what Jinja in Python gives today."""

import importlib.util
import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "chat_templates"


def cases():
    spec = importlib.util.spec_from_file_location("cases", FOLDER / "cases.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_expected_texts_are_those_of_jinja():
    made = cases().expected()
    assert made == json.loads((FOLDER / "expected.json").read_text())
    texts = [result for result in made["expected"].values() if result != "failed" and not result.startswith("raised")]
    assert len(texts) > 1000 and len({name.split(" / ")[0] for name in made["expected"]}) >= 35
