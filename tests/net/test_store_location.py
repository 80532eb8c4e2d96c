"""Tests for the value of REGISTRY_STORE."""

from __future__ import annotations

import pytest

from dockerproxy.net.store_location import StoreLocation


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://images", "https://images.s3.us-east-1.amazonaws.com/a/b"),
        ("s3://images?region=eu-west-1", "https://images.s3.eu-west-1.amazonaws.com/a/b"),
        ("s3://images?region=cn-north-1", "https://images.s3.cn-north-1.amazonaws.com.cn/a/b"),
        ("s3://images/one/two/?region=eu-west-1", "https://images.s3.eu-west-1.amazonaws.com/one/two/a/b"),
        ("s3://images?endpoint=http://127.0.0.1:9000", "http://127.0.0.1:9000/images/a/b"),
        ("s3://images/p?endpoint=https://rgw.test/", "https://rgw.test/images/p/a/b"),
        ("s3://images?endpoint=http://[::1]:9000", "http://[::1]:9000/images/a/b"),
        ("s3://images?endpoint=https://rgw.test:7480&addressing=virtual", "https://images.rgw.test:7480/a/b"),
        ("s3://my.images", "https://s3.us-east-1.amazonaws.com/my.images/a/b"),
        ("s3://my.images?addressing=virtual", "https://my.images.s3.us-east-1.amazonaws.com/a/b"),
        ("s3://images?addressing=path", "https://s3.us-east-1.amazonaws.com/images/a/b"),
    ],
)
def test_urls(text: str, url: str) -> None:
    assert StoreLocation.parse(text).url("a/b") == url


def test_the_url_of_the_bucket_and_of_a_query() -> None:
    location = StoreLocation.parse("s3://images/p?endpoint=http://rgw.test")
    assert location.url() == "http://rgw.test/images"
    assert location.url("a!b", [("prefix", "a/b c"), ("delete", "")]) == (
        "http://rgw.test/images/p/a%21b?prefix=a%2Fb%20c&delete="
    )
    assert StoreLocation.parse("s3://images?region=eu-1").url() == "https://images.s3.eu-1.amazonaws.com/"


@pytest.mark.parametrize(
    "text",
    [
        "", "images", "s3:images", "s3://", "http://images", "s3://IMAGES", "s3://a", "s3://user:secret@images",
        "s3://images#x", "s3://images/../x", "s3://images/a//b", "s3://images/a b", f"s3://images/{'a' * 300}",
        "s3://images?endpoint=rgw.test", "s3://images?endpoint=ftp://rgw.test", "s3://images?endpoint=http://",
        "s3://images?endpoint=http://rgw.test/path", "s3://images?endpoint=http://u:p@rgw.test",
        "s3://images?region=a b", "s3://images?region=a&region=b", "s3://images?secret=x",
        "s3://images?gc_time_scale=0", "s3://images?gc_time_scale=1.5", "s3://images?gc_time_scale=-1",
        "s3://images?gc_time_scale=nan", "s3://images?gc_time_scale=1e-3", "s3://images?gc_time_scale=0.0000001",
        "s3://images?endpoint=http://rgw.test&addressing=dns", "s3://images?endpoint=http://1.2.3.4&addressing=virtual",
    ],
)  # fmt: skip
def test_bad_values(text: str) -> None:
    with pytest.raises(ValueError):
        StoreLocation.parse(text)


def test_the_scale_of_tests_and_the_address() -> None:
    location = StoreLocation.parse("s3://images/site?endpoint=http://rgw.test&gc_time_scale=0.05")
    assert (location.time_scale, location.address) == (0.05, "s3://images/site")
    location = StoreLocation.parse("s3://images")
    assert (location.time_scale, location.address) == (1.0, "s3://images")
