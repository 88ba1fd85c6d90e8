"""The page writes on, says what is too long, and colours characters by what they cost."""

import threading

import pytest

pytest.importorskip("gradio")


def test_the_page_continues_a_text_and_colours_its_characters(scratch_folder):
    from demo import continue_on_page, create_page, heat_map
    from infer import character_bits, load_trained_model

    model, tokenizer = load_trained_model(scratch_folder, device_map="cpu")
    settings = {"max_new_tokens": 6, "temperature": 0.8, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1}
    *_, (text, error) = continue_on_page(model, tokenizer, "天地", settings, threading.Event())
    assert text.startswith("天地") and error == ""
    *_, (text, error) = continue_on_page(model, tokenizer, "天地" * 40, settings, threading.Event())
    assert text == "天地" * 40 and "⚠️" in error and "more than the model's context of 64" in error
    stopped = threading.Event()
    stopped.set()
    assert list(continue_on_page(model, tokenizer, "天地", settings, stopped)) == [("天地", "")]
    page = heat_map(character_bits(model, tokenizer, "天地\n玄<黄"))
    assert page.count("<span") == 6 and "&lt;" in page and "↵" in page and "比特/字节" in page
    assert heat_map([]) == "" and create_page(model, tokenizer, "tiny") is not None
