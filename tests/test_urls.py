"""What is a URL, what of it is shown, and what is a path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyak_cli.errors import UsageError, redact
from polyak_cli.storage import Version, urls

NAMES = st.text(
    st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="/"), min_size=1
).filter(lambda name: name not in (".", ".."))


@given(st.sampled_from(["s3", "gs", "az"]), st.from_regex(r"[a-z][a-z0-9-]{2,9}", fullmatch=True),
       st.lists(NAMES, max_size=4).map("/".join))  # fmt: skip
def test_a_url_is_its_parts(scheme: str, bucket: str, key: str) -> None:
    """Whatever the key is, the text of the parts is the URL."""
    text = f"{scheme}://{bucket}/{key}"
    parsed = urls.parse(text)
    assert parsed == urls.Url(scheme, bucket, key)
    assert str(parsed) == parsed.whole == text


def test_secrets_are_cut_out_of_urls() -> None:
    """User, password and signature of a web server are parts of the URL that are never shown."""
    text = "https://me:secret@host:80/a/m.h5?X-Amz-Signature=secret&b=1"
    parsed = urls.parse(text)
    assert parsed is not None
    assert (str(parsed), parsed.whole) == ("https://host:80/a/m.h5", text)
    assert redact(f"see {text}, or s3://b/x?.h5") == "see https://host:80/a/m.h5, or s3://b/x?.h5"
    for bad in ("s3:///a", "s3://b*/a", "hf://name"):
        with pytest.raises(UsageError, match="expected"):
            urls.parse(bad)
    for bad in ("s3://me:secret@b/x.h5", "S3://me:secret@b/x.h5", "az://c/x.h5?sv=1&sig=secret",
                "s3://b/x.h5?X-Amz-Date=1&X-Amz-Signature=secret"):  # fmt: skip
        with pytest.raises(UsageError, match="takes no password and no signature") as caught:
            urls.parse(bad)
        assert "secret" not in str(caught.value)
    assert urls.parse("a/b") is urls.parse("s3:/b") is urls.parse("") is None
    assert Version(0, 0, 1, 1, "x").is_object


@pytest.mark.parametrize("scheme", ["s3", "gs", "az", "https", "hf"])
@pytest.mark.parametrize("key", ["/a.h5", "a//b.h5", "a/../b.h5", "./b.h5", "..", "a\nb.h5", "a//"])
def test_keys_that_no_client_sends_as_they_are_are_refused(scheme: str, key: str) -> None:
    """Stores take them for other names than a path does; the message says which part is wrong."""
    with pytest.raises(UsageError, match="expected a key without") as caught:
        urls.parse(f"{scheme}://owner/name/{key}")
    assert "\n" not in str(caught.value)
    assert urls.parse(f"{scheme}://owner/name/a/") is not None
