"""Claims about what is hidden before a text is written, and what is not."""

import shlex

import pytest

from dist_vlcl.masking import explained, masked, masked_command, masked_values


@pytest.mark.parametrize(
    "text",
    [
        "https://host/{}?token=hush&part=1",
        "https://host/{}?sv=1&sig=hush%2B&se=2",
        "https://user:hush@host/{}",
        "https://user:hu/sh@host/{}",
        "https://user:hu@sh@host/{}",
        "db_password='hush hush' other=1",
        "wandb_api_key=hush",
        "pwd=hush",
        "curl -H 'Authorization: Bearer hush' https://host/{}",
        "Bearer hush",
        "basic huVodWhV",
        "curl -H 'Authorization: token hush' https://host/{}",
        'curl -H "X-Api-Key: hush" https://host/{}',
        "curl --header 'PRIVATE-TOKEN: hush' https://host/{}",
        "curl -uuser:hush https://host/{}",
        "curl -u user:hush https://host/{}",
        "curl --user=user:hush https://host/{}",
        "tool --access-token hush {}",
        "tool --Password hush",
        '{"api_key": "hush", "a": 1}',
        "{'my-token': 'hush'}",
        "X-Auth-Token: hush",
        "PRIVATE-TOKEN: hush",
        "authorization: hush",
        "curl --proxy-user user:hush https://host/{}",
        "MY_PASSPHRASE=hush",
    ],
)
def test_a_secret_is_hidden_and_the_rest_is_not(text):
    said = masked(text)
    assert "hu" not in said and "***" in said
    assert "host/{}" in said or "host" not in text


@pytest.mark.parametrize(
    "text",
    [
        "model.tokenizer=simple keys: 3",
        "zo.epsilon.vision=0.0005 run.keep=2 data.url=https://host/{}",
        "compass=north bypass=1",
        "data.passes=2",
        "rank 0: it stopped",
        "model.prompt='a basic photo of a {}.'",
        "model.prompt='a Basic photorealistic, computer-generated image of a {}.'",
    ],
)
def test_what_is_no_secret_stays(text):
    assert masked(text) == text


def test_the_value_of_a_variable_with_a_telling_name_is_hidden_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct-horse")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "sometimes")
    monkeypatch.setenv("SHORT_SECRET", "data")  # it may be an ordinary word
    assert masked("https://host/correct-horse/data is sometimes at correct-horse") == "https://host/***/data is sometimes at ***"
    assert masked_values({"url": "s3://correct-horse", "access_key": "hush", "n": 1}) == {"url": "s3://***", "access_key": "***", "n": 1}


def test_control_characters_do_not_reach_the_terminal():
    assert masked("a\x1b]0;x\x07b\x9bm\u202ec\r\n\td") == "a\\x1b]0;x\\x07b\\x9bm\\u202ec\\r\n\td"


def test_a_command_hides_what_its_quotes_would_hide_from_us_and_is_else_what_a_shell_takes():
    words = ["a b", "data.url=pipe:curl -H 'PRIVATE-TOKEN: hush' https://host/{}", "--access-token", "hush", "data.root='x'"]
    said = masked_command(words)
    assert "hush" not in said
    read = shlex.split(said)
    assert (len(read), read[0], read[4]) == (5, words[0], words[4])


def test_a_secret_that_crosses_the_end_of_a_long_message_is_hidden(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "first-line-of-a-key\nsecond-line-of-it")
    with pytest.raises(ValueError, match="outer: x") as found, explained("outer", "do this"):
        raise ValueError("x" * 980 + " first-line-of-a-key\nsecond-line-of-it")
    assert "first-line" not in str(found.value) and str(found.value).endswith("; do this")
