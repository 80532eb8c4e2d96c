"""Settings from the environment and .env files: valid and invalid values, and that errors contain no password."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from attrs import fields
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.net.addresses import AddressSet
from dockerproxy.oci.credentials import BasicCredentials
from dockerproxy.oci.docker_hub import DOCKER_HUB, DOCKER_HUB_ALIASES, DOCKER_HUB_TOKENS
from dockerproxy.oci.names import Host, Registry
from dockerproxy.settings import Settings, SettingsError, read_env_file, unread_names

ROOT = Path(__file__).parent.parent
NAMES = [
    "REGISTRIES",
    *(
        attribute.name.upper()
        for attribute in fields(Settings)
        if attribute.name not in ("extra_registries", "registry_wildcards", "warnings")
    ),
]
SECRET = "Pa55wOrd"

SEED = """\
REGISTRIES=k8s.gcr.io quat.io mirror.gcr.io mirrors--dockerhub.company.com
AUTH_REGISTRIES=auth.docker.io:meermanr:dckr_pat_myPASSWORD registry-1.docker.io:meermanr:dckr_pat_myPASSWORD mirrors--dockerhub.company.com:robert.meerman@company.com:REDACTEDREDACTED
"""  # noqa: E501 - an actual file of a user


def settings(**env: str) -> Settings:
    return Settings.from_environment(env)


def error_message(**env: str) -> str:
    with pytest.raises(SettingsError) as raised:
        settings(**env)
    return str(raised.value)


def env_file(directory: Path, text: str) -> dict[str, str]:
    path = directory / ".env"
    path.write_bytes(text.encode())
    return read_env_file(path)


# Defaults and derived values


def test_defaults_are_the_documented_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    defaults = settings()
    assert defaults.registries == (Registry.parse("registry-1.docker.io"),)
    assert defaults.intercepted == (DOCKER_HUB, DOCKER_HUB_TOKENS, *DOCKER_HUB_ALIASES)
    assert defaults.extra_registries == ()
    assert defaults.auth_registries == {}
    assert defaults.cache_max_size == 32 * 1024**3
    assert defaults.cache_inactive == 60 * 86400
    assert defaults.pull_history == 30 * 86400
    assert Settings.from_environment({"PULL_HISTORY": "OFF"}).pull_history == 0
    assert (defaults.allow_push, defaults.enable_manifest_cache, defaults.verify_ssl, defaults.disable_ipv6) == (
        False,
        False,
        True,
        False,
    )
    assert defaults.manifest_cache_primary_time == 600
    assert defaults.manifest_cache_secondary_time == 60 * 86400
    assert defaults.manifest_cache_default_time == 3600
    assert (defaults.keepalive_timeout, defaults.client_header_timeout, defaults.proxy_read_timeout) == (300, 60, 60)
    assert defaults.state_dir == tmp_path / "var"
    assert defaults.cache_dir == tmp_path / "var/cache"
    assert defaults.registry_dir == tmp_path / "var/registry"
    assert defaults.ca_dir == tmp_path / "var/ca"
    assert (defaults.ca_crt_file, defaults.ca_key_file, defaults.ca_key_passphrase) == (None, None, None)
    assert defaults.proxy_listen == ("tcp:3128",)
    assert defaults.registry_listen == ("tcp:5443",)
    assert defaults.registry_http_listen == ()
    assert defaults.registry_hostname == ("docker-registry.local",)
    assert defaults.upstream_addresses == {}
    assert defaults.upstream_proxy is None
    assert (defaults.allowed_hosts, defaults.cors_origins) == ((), ())
    assert defaults.tunnel_ports == {443}
    assert defaults.max_connections_per_client is None
    assert defaults.client_min_rate == 500
    assert "192.168.1.1" in defaults.allow_clients
    assert "203.0.113.1" not in defaults.allow_clients
    assert defaults.tunnel_allow.match_address("203.0.113.1") == "all"
    assert defaults.tunnel_deny.match_address("169.254.169.254")
    assert not defaults.tunnel_deny.match_address("10.0.0.1")
    assert (defaults.share_auth_registries, defaults.anonymous_pull, defaults.htpasswd_file) == (True, False, None)
    assert defaults.proxy_htpasswd_file is None
    assert (defaults.max_uploads, defaults.max_uploads_per_client) == (10_000, 3_000)
    assert defaults.registry_store is None
    assert (defaults.registry_read_only, defaults.allow_delete, defaults.allow_sparse_indexes) == (False, True, False)
    assert defaults.proxy_tls_listen == ()
    assert defaults.registry_crt_file is defaults.registry_key_file is None
    assert defaults.proxy_crt_file is defaults.proxy_key_file is None
    assert 1 <= defaults.workers <= 8
    assert defaults.log_format == "text"
    assert defaults.warnings == ()


def test_empty_settings_count_as_unset() -> None:
    assert Settings.from_environment(dict.fromkeys([*NAMES, "STATE_DIRECTORY"], "")) == settings()


def test_systemd_state_directory() -> None:
    assert settings(STATE_DIRECTORY="/var/lib/a:/var/lib/b").cache_dir == Path("/var/lib/a/cache")
    parsed = settings(STATE_DIRECTORY="/var/lib/a", STATE_DIR="/srv/b", CACHE_DIR="/mnt/cache")
    assert (parsed.state_dir, parsed.cache_dir, parsed.ca_dir) == (
        Path("/srv/b"),
        Path("/mnt/cache"),
        Path("/srv/b/ca"),
    )


def test_systemd_runtime_directory() -> None:
    assert settings(STATE_DIR="/srv/b").runtime_dir == Path("/srv/b/run")
    assert settings(STATE_DIR="/srv/b", RUNTIME_DIRECTORY="/run/a:/run/b").runtime_dir == Path("/run/a")
    assert settings(RUNTIME_DIR="/run/mine", RUNTIME_DIRECTORY="/run/a").runtime_dir == Path("/run/mine")


def test_relative_paths_are_relative_to_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings(STATE_DIR="state").ca_dir == tmp_path / "state/ca"


# The .env file


def test_env_file_of_a_user(tmp_path: Path) -> None:
    parsed = Settings.from_environment({}, env_file(tmp_path, SEED))
    assert [str(registry) for registry in parsed.registries] == [
        "registry-1.docker.io",
        "k8s.gcr.io",
        "quat.io",
        "mirror.gcr.io",
        "mirrors--dockerhub.company.com",
    ]
    assert parsed.auth_registries == {
        Host("auth.docker.io", 443): BasicCredentials("meermanr", "dckr_pat_myPASSWORD"),
        Host("registry-1.docker.io", 443): BasicCredentials("meermanr", "dckr_pat_myPASSWORD"),
        Host("mirrors--dockerhub.company.com", 443): BasicCredentials("robert.meerman@company.com", "REDACTEDREDACTED"),
    }
    assert parsed.warnings == ()


def test_documentation_has_every_setting() -> None:
    documented = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", (ROOT / "docs" / "settings.md").read_text("utf-8")))
    assert documented >= set(NAMES)


def test_example_env_file_is_valid() -> None:
    example = ROOT / ".env.example"
    text = re.sub(r"^#(?=[A-Z_]+=)", "", example.read_text("utf-8"), flags=re.MULTILINE)
    variables = dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))
    parsed = Settings.from_environment({}, variables)
    assert parsed.warnings == ()
    assert parsed.auth_registries[Host("gcr.io", 443)].user == "_json_key"


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=b", "b"),
        ("export A=b", "b"),
        ("  A = b  ", "b"),
        ("A=b c:d  e", "b c:d  e"),
        ("A=b=c", "b=c"),
        ("A='b c '", "b c "),
        ('A="b"', "b"),
        ('A=" "', " "),
        ('A="b # c"', "b # c"),
        ('A="b" # "c"', "b"),
        ("A=b # c", "b"),
        ("A=b#c", "b#c"),
        ("A=#c", ""),
        ("A= # c", ""),
        ("A=", ""),
        ('A=""', ""),
        ('A="b', '"b'),
        ("A=b'c'", "b'c'"),
        ('A="b" "c"', 'b" "c'),
        ("A=$HOME\\n", "$HOME\\n"),
        ('A=x:_json_key:{"a": "b"}', 'x:_json_key:{"a": "b"}'),
        ("A=1\nA=2", "2"),
        ("# A=1\n\nA=2\n#A=3\n", "2"),
        ("A=b\r\n", "b"),
        ("\ufeffA=b", "b"),
    ],
)
def test_env_file_lines(tmp_path: Path, line: str, value: str) -> None:
    assert env_file(tmp_path, line) == {"A": value}


@pytest.mark.parametrize("line", ["PASSWORD secret", "secret", "=secret", "A B=secret", "1A=secret", "export secret"])
def test_malformed_line_is_reported_by_number_only(tmp_path: Path, line: str) -> None:
    with pytest.raises(SettingsError) as raised:
        env_file(tmp_path, f"A=1\n\n{line}\n")
    assert str(raised.value) == f"{tmp_path}/.env, line 3, is not NAME=value."


def test_unreadable_env_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"/missing cannot be read: No such file or directory\.$"):
        read_env_file(tmp_path / "missing")
    (tmp_path / "latin").write_bytes(b"A=\xe4")
    with pytest.raises(SettingsError, match=r"/latin is not UTF-8 text\.$"):
        read_env_file(tmp_path / "latin")


@given(
    st.dictionaries(
        st.from_regex(r"[A-Z_][A-Z0-9_]{0,9}", fullmatch=True),
        st.text(st.characters(codec="utf-8", exclude_characters="\r\n")),
    )
)
def test_quoted_values_round_trip(tmp_path_factory: pytest.TempPathFactory, variables: dict[str, str]) -> None:
    expected = {name: value for name, value in variables.items() if not re.search(r'"\s+#', value)}
    text = "".join(f'{name}="{value}"\n' for name, value in expected.items())
    assert env_file(tmp_path_factory.mktemp("env"), text) == expected


def test_environment_overrides_env_file() -> None:
    parsed = Settings.from_environment({"WORKERS": "3"}, {"WORKERS": "2", "LOG_FORMAT": "json"})
    assert (parsed.workers, parsed.log_format) == (3, "json")


def test_typo_in_env_file_gives_a_warning() -> None:
    file = {
        "REGISTRY": "quay.io",
        "AUTH_REGISTRY": "a:b:secret",
        "cache_max_size": "1g",
        "HTTP_PROXY": "x",
        "LANG": "C",
    }
    parsed = Settings.from_environment({"REGISTRYS": "not in the file"}, file)
    assert parsed.warnings == (
        "REGISTRY is not a setting and has no effect. Did you mean REGISTRY_URL or REGISTRY_DIR or REGISTRIES?",
        "AUTH_REGISTRY is not a setting and has no effect. Did you mean AUTH_REGISTRIES?",
        "cache_max_size is not a setting and has no effect. Did you mean CACHE_MAX_SIZE?",
    )


# Registries and logins


def test_registries_in_each_form_without_duplicates() -> None:
    text = "quay.io  https://quay.io/ QUAY.IO. registry.test:5000 http://plain.test http://plain.test:8080 [::1]:5000"
    assert settings(REGISTRIES=text).extra_registries == tuple(
        Registry.parse(expected)
        for expected in ("quay.io", "registry.test:5000", "http://plain.test", "http://plain.test:8080", "[::1]:5000")
    )


def test_docker_hub_is_always_included() -> None:
    names = "docker.io auth.docker.io registry-1.docker.io index.docker.io registry.hub.docker.com"
    parsed = settings(REGISTRIES=f"{names} ghcr.io")
    assert parsed.registries == (DOCKER_HUB, Registry.parse("ghcr.io"))
    assert parsed.intercepted == (DOCKER_HUB, Registry.parse("ghcr.io"), DOCKER_HUB_TOKENS, *DOCKER_HUB_ALIASES)


@pytest.mark.parametrize("text", ["*.pkg.dev", "*.dkr.ecr.eu-west-1.amazonaws.com", "*.azurecr.io", "*.company.lan"])
def test_registry_wildcards(text: str) -> None:
    parsed = settings(REGISTRIES=f"quay.io {text}:443 {text}", AUTH_REGISTRIES=f"{text}:user:pass:word quay.io:a:b")
    assert list(map(str, parsed.extra_registries)) == ["quay.io"]
    assert list(map(str, parsed.registry_wildcards)) == [text]
    assert [str(key) for key in parsed.auth_registries] == [text, "quay.io"]
    assert next(iter(parsed.auth_registries.values())) == BasicCredentials("user", "pass:word")


@pytest.mark.parametrize("name", ["REGISTRIES", "AUTH_REGISTRIES"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("*.com", "everybody can register a domain below com"),
        ("*.co.uk", "everybody can register a domain below co.uk"),
        ("*.lan", "everybody can register a domain below lan"),
        ("*", None),
        ("*.", None),
        ("*pkg.dev", None),
        ("a.*.pkg.dev", None),
        ("*.10.1.2.3", None),
        ("*.*.pkg.dev", None),
    ],
)
def test_bad_wildcards(name: str, text: str, reason: str | None) -> None:
    with pytest.raises(SettingsError) as excinfo:
        settings(**{name: text if name == "REGISTRIES" else f"{text}:user:secret"})
    message = str(excinfo.value)
    assert message.startswith(f"{name}: ")
    assert "secret" not in message
    if reason is not None and name == "REGISTRIES":
        assert reason in message


def test_registry_with_both_http_and_https_is_rejected() -> None:
    assert error_message(REGISTRIES="http://a.test:5000 a.test:5000") == (
        "REGISTRIES: 'a.test:5000' is given both with http:// and without."
    )


def parse_logins(text: str, entry_delimiter: str = "", field_delimiter: str = "") -> dict[str, tuple[str, str]]:
    parsed = settings(
        AUTH_REGISTRIES=text, AUTH_REGISTRIES_DELIMITER=entry_delimiter, AUTH_REGISTRY_DELIMITER=field_delimiter
    )
    return {str(host): (login.user, login.password) for host, login in parsed.auth_registries.items()}


@pytest.mark.parametrize(
    ("text", "entry_delimiter", "field_delimiter", "expected"),
    [
        ("quay.io:u:p", "", "", {"quay.io": ("u", "p")}),
        ("quay.io:u:p:w:", "", "", {"quay.io": ("u", "p:w:")}),
        ("  quay.io:u:p\n ghcr.io:v:q ", "", "", {"quay.io": ("u", "p"), "ghcr.io": ("v", "q")}),
        ("host:5000:user:pass", "", "", {"host:5000": ("user", "pass")}),
        ("host:5000:user:pa:ss", "", "", {"host:5000": ("user", "pa:ss")}),
        ("host:5000:pass", "", "", {"host": ("5000", "pass")}),
        ("host:99999:pa:ss", "", "", {"host": ("99999", "pa:ss")}),
        ("[::1]:5000:user:pass [::1]:user:pass", "", "", {"[::1]:5000": ("user", "pass"), "[::1]": ("user", "pass")}),
        ("https://quay.io:u:p", "", "", {"quay.io": ("u", "p")}),
        ("http://plain.test:u:p", "", "", {"plain.test:80": ("u", "p")}),
        ("https://index.docker.io/v1/:u:p:/v1/", "", "", {"index.docker.io": ("u", "p:/v1/")}),
        ("index.docker.io/v1/:u:p quay.io/:u:p", "", "", {"index.docker.io": ("u", "p"), "quay.io": ("u", "p")}),
        ("https://host:5000/v2/:u:p [::1]:5000/v1:u:p", "", "", {"host:5000": ("u", "p"), "[::1]:5000": ("u", "p")}),
        ("https://host:5000/v1/|u|p", "", "|", {"host:5000": ("u", "p")}),
        ("quay.io:u:p quay.io:u:p", "", "", {"quay.io": ("u", "p")}),
        (
            'gcr.io:_json_key:{"a": "b c"};;;quay.io:u:p',
            ";;;",
            "",
            {"gcr.io": ("_json_key", '{"a": "b c"}'), "quay.io": ("u", "p")},
        ),
        ("host:5000|us:er|pa|ss ;; quay.io|u|p", ";;", "|", {"host:5000": ("us:er", "pa|ss"), "quay.io": ("u", "p")}),
        ("a.test:::u:::p:::q;;;b.test:::u:::p", ";;;", ":::", {"a.test": ("u", "p:::q"), "b.test": ("u", "p")}),
    ],
)
def test_logins(text: str, entry_delimiter: str, field_delimiter: str, expected: dict[str, tuple[str, str]]) -> None:
    assert parse_logins(text, entry_delimiter, field_delimiter) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SECRET", "entry 1 has no user; expected host:user:password"),
        ("quay.io:SECRET", "entry 1 (quay.io) has no password; expected host:user:password"),
        (
            "quay.io:u:p registry-1.docker.io:SECRET:",
            "entry 2 (registry-1.docker.io) has no password; expected host:user:password",
        ),
        ("quay.io:u:p SECRET:x", "entry 2 has no password; expected host:user:password"),
        ("quay.io:u:SECRET SECRET", "entry 2 has no user; expected host:user:password"),
        ("quay.io:u:SECRET SECRET/v1/x/:a:b", "entry 2 does not begin with a host; expected host:user:password"),
        ("quay.io:u:SECRET SEC/RET:a:b", "entry 2 does not begin with a host; expected host:user:password"),
        ("quay.io:u:SECRET quay.io:u:SECRET2", "entry 2 repeats the host of an earlier entry with another login"),
    ],
)
def test_malformed_login(text: str, message: str) -> None:
    assert error_message(AUTH_REGISTRIES=text) == f"AUTH_REGISTRIES: {message}."


PASSWORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0|;"), min_size=1).filter(
    lambda p: p == p.strip()
)
USERS = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9._@-]{0,20}", fullmatch=True)
HOSTS = st.from_regex(r"[a-z][a-z0-9]{0,10}\.(test|example)(:[1-9][0-9]{0,3})?", fullmatch=True)


@given(st.dictionaries(HOSTS.map(lambda text: str(Host.parse(text))), st.tuples(USERS, PASSWORDS), max_size=4))
def test_logins_round_trip(logins: dict[str, tuple[str, str]]) -> None:
    text = ";;;".join(f"{host}|{user}|{password}" for host, (user, password) in logins.items())
    assert parse_logins(text, ";;;", "|") == logins


@given(
    st.dictionaries(
        HOSTS.map(lambda text: str(Host.parse(text))),
        st.tuples(USERS, PASSWORDS.filter(lambda p: not re.search(r"\s", p))),
        max_size=4,
    )
)
def test_logins_round_trip_with_default_delimiters(logins: dict[str, tuple[str, str]]) -> None:
    assert parse_logins(" ".join(f"{host}:{user}:{password}" for host, (user, password) in logins.items())) == logins


# Values of each type


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("10m", 600),
        ("1h", 3600),
        ("60d", 60 * 86400),
        ("2w", 14 * 86400),
        ("250ms", 0.25),
        ("1h30m", 5400),
        ("1.5s", 1.5),
        ("45", 45),
        ("0s", 0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert settings(MANIFEST_CACHE_DEFAULT_TIME=text).manifest_cache_default_time == pytest.approx(seconds)


@given(
    st.integers(1, 10**6),
    st.sampled_from(
        [("", 1), ("k", 2**10), ("m", 2**20), ("g", 2**30), ("t", 2**40), ("GB", 2**30), ("MiB", 2**20), ("G", 2**30)]
    ),
)
def test_sizes(number: int, unit: tuple[str, int]) -> None:
    assert settings(CACHE_MAX_SIZE=f"{number}{unit[0]}").cache_max_size == number * unit[1]


def test_one_blob_may_take_three_quarters_of_the_cache() -> None:
    assert settings(CACHE_MAX_SIZE="4g").max_blob_size == 3 << 30
    assert settings(CACHE_MAX_SIZE="4g", CACHE_MAX_BLOB_SIZE="1g").max_blob_size == 1 << 30
    assert settings(CACHE_MAX_SIZE="4g", CACHE_MAX_BLOB_SIZE="8g").max_blob_size == 4 << 30


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("YES", True),
        ("1", True),
        ("On", True),
        ("false", False),
        ("no", False),
        ("0", False),
        ("OFF", False),
        (" true ", True),
    ],
)
def test_booleans(text: str, value: bool) -> None:
    assert settings(ALLOW_PUSH=text).allow_push is value


def test_tag_patterns_are_anchored_at_the_start_only() -> None:
    parsed = settings()
    assert parsed.manifest_cache_primary_regex.match("stable-slim")
    assert not parsed.manifest_cache_primary_regex.match("unstable")
    assert parsed.manifest_cache_secondary_regex.match("v1.2.3")
    assert not parsed.manifest_cache_secondary_regex.match("latest")
    assert settings(MANIFEST_CACHE_PRIMARY_REGEX="dev|main").manifest_cache_primary_regex.match("main")


def test_ports_and_ranges() -> None:
    assert settings(CLIENT_MIN_RATE="0").client_min_rate == 0
    assert settings(CLIENT_MIN_RATE="2k").client_min_rate == 2048
    assert settings(TUNNEL_PORTS="443 8000-8002").tunnel_ports == {443, 8000, 8001, 8002}


def test_endpoints() -> None:
    text = r"tcp:3128 tcp6:3128:interface=\:\:1 systemd:domain=INET:index=0 unix:/run/p tcp:port=80"
    assert settings(PROXY_LISTEN=text).proxy_listen == tuple(text.split())
    assert settings(REGISTRY_LISTEN="none").registry_listen == ()


def test_registry_host_names() -> None:
    assert settings(REGISTRY_HOSTNAME="Registry.local docker.example registry.local").registry_hostname == (
        "registry.local",
        "docker.example",
    )


def test_upstream_addresses() -> None:
    parsed = settings(UPSTREAM_ADDRESSES="registry.test:5000=127.0.0.1:25000 quay.io=[::1]:5443 plain.test:80=10.0.0.1")
    assert parsed.upstream_addresses == {
        Host("registry.test", 5000): Host("127.0.0.1", 25000),
        Host("quay.io", 443): Host("::1", 5443),
        Host("plain.test", 80): Host("10.0.0.1", 80),
    }


def test_upstream_proxy() -> None:
    parsed = settings(
        UPSTREAM_PROXY="http://us%3Aer:p%40ss/w@proxy.test:3128/".replace("/w", "%2Fw"),
        NO_PROXY="a.test,.b.test c.test",
    )
    assert parsed.upstream_proxy is not None
    assert (parsed.upstream_proxy.host, parsed.upstream_proxy.port) == ("proxy.test", 3128)
    assert parsed.upstream_proxy.authorization == "Basic " + base64.b64encode(b"us:er:p@ss/w").decode()
    assert parsed.upstream_proxy.no_proxy == ("a.test", ".b.test", "c.test")


def test_a_list_of_upstream_proxies() -> None:
    parsed = settings(UPSTREAM_PROXY="http://a.test:3128 user:pw@b.test direct", NO_PROXY="c.test").upstream_proxy
    assert parsed is not None and parsed.direct and parsed.host == "a.test"
    assert [(other.host, other.port, other.no_proxy) for other in parsed.others] == [("b.test", 80, ("c.test",))]
    assert settings(UPSTREAM_PROXY="direct").upstream_proxy is None
    alone = settings(UPSTREAM_PROXY="a.test").upstream_proxy
    assert alone is not None and not alone.direct and alone.others == ()


def test_upstream_proxy_variable_precedence() -> None:
    def port(**env: str) -> int | None:
        proxy = settings(**env).upstream_proxy
        return None if proxy is None else proxy.port

    assert port(https_proxy="proxy.test:1") == 1
    assert port(https_proxy="proxy.test:1", HTTPS_PROXY="http://proxy.test:2") == 2
    assert port(HTTPS_PROXY="http://proxy.test:2", UPSTREAM_PROXY="http://proxy.test") == 80
    assert port(HTTPS_PROXY="http://proxy.test:2", UPSTREAM_PROXY="none") is None
    assert port(HTTP_PROXY="http://proxy.test:2") is None


def test_allowed_hosts() -> None:
    patterns = settings(ALLOWED_HOSTS="Mirror.Example.com. *.example.org .example.net 10.0.0.1 [::1]").allowed_hosts
    assert patterns is not None
    assert [pattern.name for pattern in patterns] == ["mirror.example.com", "example.org", "example.net"]
    assert [pattern.matches("a.example.org") for pattern in patterns] == [False, True, False]
    assert settings(ALLOWED_HOSTS="a.example ALL").allowed_hosts is None


def test_cors_origins_are_written_as_browsers_write_them() -> None:
    origins = settings(
        CORS_ORIGINS="HTTPS://UI.Example.com:443/ http://ui.example.com:80 http://[::1]:8080 https://ui.example.com"
    ).cors_origins
    assert origins == ("https://ui.example.com", "http://ui.example.com", "http://[::1]:8080")


def test_registry_url_and_trusted_proxies() -> None:
    assert settings().registry_url is None
    url = settings(REGISTRY_URL="HTTPS://Reg.Example.com:8443/").registry_url
    assert url is not None
    assert url.origin == "https://reg.example.com:8443"
    assert settings(REGISTRY_URL="https://reg.example.com:443").registry_url == Registry.parse("reg.example.com")
    assert settings(REGISTRY_URL="http://[::1]").registry_url == Registry.parse("http://[::1]:80")
    assert settings().trusted_proxies == settings(TRUSTED_PROXIES="none").trusted_proxies == AddressSet()
    proxies = settings(TRUSTED_PROXIES="loopback 10.0.0.0/24 2001:db8::5").trusted_proxies
    assert [proxies.match(address) for address in ("127.0.0.1", "10.0.0.9", "10.0.1.9", "2001:db8::5")] == [
        "loopback",
        "10.0.0.0/24",
        None,
        "2001:db8::5",
    ]


# Invalid values

INVALID = [
    ("REGISTRIES", "quay.io/v2/", "'quay.io/v2/' is not a registry such as quay.io"),
    ("REGISTRIES", "quay.io ftp://x", "'ftp://x' is not a registry"),
    ("REGISTRIES", "quay.io:99999", "'quay.io:99999' is not a registry"),
    ("REGISTRIES", "quay.io:user:SECRET", "'quay.io:…' is not a registry"),
    ("REGISTRIES", "https://user:SECRET@quay.io", "'…@quay.io' is not a registry"),
    ("ALLOW_PUSH", "maybe", "'maybe' is neither true nor false"),
    ("CACHE_MAX_SIZE", "32x", "'32x' is not a size such as 512m or 32g"),
    ("CACHE_MAX_SIZE", "0", "'0' is not a size"),
    ("CACHE_MAX_SIZE", "-1g", "'-1g' is not a size"),
    ("CACHE_MAX_BLOB_SIZE", "0", "'0' is not a size"),
    ("CACHE_MAX_BLOB_SIZE", "half", "'half' is not a size such as 512m or 32g"),
    ("CACHE_INACTIVE", "60 d", "'60 d' is not a time such as 90s, 10m, 1h or 60d"),
    ("CACHE_INACTIVE", "0s", "'0s' is not allowed; use a time greater than zero"),
    ("CACHE_INACTIVE", "999999d", "'999999d' is a time of more than 100 years"),
    ("PROXY_READ_TIMEOUT", "-5s", "'-5s' is not a time"),
    ("PROXY_READ_TIMEOUT", "inf", "'inf' is not a time"),
    ("MANIFEST_CACHE_PRIMARY_REGEX", "(stable", "'(stable' is not a regular expression ("),
    ("MANIFEST_CACHE_SECONDARY_REGEX", "a{99999999999999999999}", "is not a regular expression ("),
    ("MANIFEST_CACHE_SECONDARY_REGEX", "(" * 20000, "is not a regular expression ("),
    ("PROXY_LISTEN", "3128", "'3128' is not an endpoint such as tcp:3128"),
    ("PROXY_LISTEN", "0.0.0.0:3128", "'0.0.0.0:3128' is not an endpoint"),
    ("PROXY_LISTEN", "tcp:3128 tcp:http", "'tcp:http' is not an endpoint"),
    ("PROXY_LISTEN", "tcp:70000", "'tcp:70000' is not an endpoint"),
    ("PROXY_LISTEN", "none", "'none' is not an endpoint"),
    (
        "PROXY_LISTEN",
        "ssl:3128:privateKey=k.pem:certKey=c.pem",
        "for TLS to the proxy write tcp:PORT in PROXY_TLS_LISTEN",
    ),
    ("REGISTRY_LISTEN", "ssl:5443", "REGISTRY_LISTEN has TLS already"),
    ("REGISTRY_HOSTNAME", "a_b/c", "'a_b/c' is not a host name"),
    ("REGISTRY_HOSTNAME", "a.test:443", "'a.test:443' has a port; use the host name only"),
    ("UPSTREAM_ADDRESSES", "a.test", "'a.test' is not host=address:port"),
    ("UPSTREAM_ADDRESSES", "a.test=b.test:1", "'a.test=b.test:1' is not host=address:port"),
    ("UPSTREAM_ADDRESSES", "a.test=1.2.3.4 a.test=1.2.3.5", "'a.test:443' is given twice, with different addresses"),
    ("UPSTREAM_PROXY", "socks5://user:SECRET@proxy:1080", "'…@proxy:1080' is not an HTTP proxy such as"),
    ("UPSTREAM_PROXY", "http://user:SEC/RET@proxy:1080", "'…@proxy:1080' is not an HTTP proxy such as"),
    ("UPSTREAM_PROXY", "http://[::1", "'http://[::1' is not an HTTP proxy such as"),
    ("UPSTREAM_PROXY", "a.test b.test:80 a.test:80", "a proxy is given twice"),
    ("UPSTREAM_PROXY", "direct a.test", "'direct' is not a proxy; none has to be alone, and direct has to be last"),
    ("UPSTREAM_PROXY", "a.test none", "'none' is not a proxy; none has to be alone"),
    ("UPSTREAM_PROXY", "a.test socks5://user:SECRET@proxy:1080", "'…@proxy:1080' is not an HTTP proxy such as"),
    ("HTTPS_PROXY", "https://proxy", "'https://proxy' is not an HTTP proxy such as"),
    (
        "ALLOW_CLIENTS",
        "example.com",
        "'example.com' is not an address, a network such as 10.0.0.0/8 or one of all, none, private",
    ),
    ("ALLOW_CLIENTS", "https://user:SECRET@x", "'…@x' is not an address"),
    ("FLEET", "10.0.0.1 10.0.0.1:3128", "'10.0.0.1:3128' is given twice"),
    ("FLEET", "a.example 10.0.0.1", "'a.example' is a name; give either one name whose addresses are the members, or"),
    ("FLEET", "a.example b.example", "'a.example' is a name; give either one name"),
    ("FLEET", "10.0.0.1,10.0.0.2", "'10.0.0.1,10.0.0.2' is not a member such as 10.0.0.1 or 10.0.0.1:3128"),
    ("FLEET", "10.0.0.0/24", "'10.0.0.0/24' is not a member"),
    ("FLEET", "http://10.0.0.1", "'http://10.0.0.1' is not a member"),
    ("FLEET_ADDRESS", "a.example", "'a.example' is a name; write the address of this daemon that FLEET has"),
    ("FLEET_ADDRESS", "10.0.0.1:0", "'10.0.0.1:0' is not a member"),
    ("FLEET_ADDRESS", "10.0.0.1", "FLEET_ADDRESS is set and FLEET is not; FLEET has the addresses of all members"),
    ("FLEET_FAN_OUT", "0", "'0' is not a number from 1 to 1000"),
    ("FLEET_TIMEOUT", "0", "'0' is not allowed; use a time greater than zero"),
    ("CLIENT_MIN_RATE", "slow", "'slow' is not a size such as 512m or 32g"),
    ("MAX_CONNECTIONS_PER_CLIENT", "0", "'0' is not a number from 1 to 1000000"),
    ("MAX_CONNECTIONS_PER_CLIENT", "many", "'many' is not a number from 1 to 1000000"),
    ("ALLOWED_HOSTS", "a.example:3128", "'a.example:3128' is not a host name without a port"),
    ("ALLOWED_HOSTS", "http://a.example", "'http://a.example' is not a host name"),
    ("ALLOWED_HOSTS", "*", "'*' is not a host name without a port, such as proxy.example.com or *.example.com, nor"),
    ("ALLOWED_HOSTS", "a.*.example", "'a.*.example' is not a host name"),
    ("PAGE", "private", "'private' is not one of public, users, admin, off"),
    ("ADMIN_USERS", "alice:secret", "'alice:…' is not the name of a user"),
    ("CORS_ORIGINS", "*", "'*' is not allowed, because then every web page could read and change this registry"),
    ("CORS_ORIGINS", "ui.example.com", "'ui.example.com' is not the origin of a web page, such as https://"),
    ("CORS_ORIGINS", "https://ui.example.com/path", "'https://ui.example.com/path' is not the origin of a web page"),
    ("CORS_ORIGINS", "https://*.example.com", "'https://*.example.com' is not the origin of a web page"),
    ("CORS_ORIGINS", "null", "'null' is not the origin of a web page"),
    ("CORS_ORIGINS", "file://x", "'file://x' is not the origin of a web page"),
    (
        "REGISTRY_URL",
        "reg.example.com",
        "'reg.example.com' is not the URL of a registry, such as https://reg.example.com",
    ),
    ("REGISTRY_URL", "ftp://reg.example.com", "is not the URL of a registry"),
    ("REGISTRY_URL", "https://user:SECRET@reg.example.com", "'…@reg.example.com' is not the URL of a registry"),
    ("REGISTRY_URL", "https://reg.example.com?x=1", "is not the URL of a registry"),
    (
        "REGISTRY_URL",
        "https://reg.example.com/hub",
        "has a path, but clients ask for /v2/ directly below the host; write",
    ),
    ("REGISTRY_URL", "https://reg.example.com:0", "is not the URL of a registry"),
    ("REGISTRY_URL", "https:///", "is not the URL of a registry"),
    ("TRUSTED_PROXIES", "nginx.example.com", "'nginx.example.com' is not an address, a network such as 10.0.0.0/8"),
    ("TRUSTED_PROXIES", "all", "'all' contains all clients, each of which could then claim any address"),
    ("TRUSTED_PROXIES", "127.0.0.1 ::/0", "'::/0' contains all clients"),
    ("TRUSTED_PROXIES", "0.0.0.0/0", "'0.0.0.0/0' contains all clients"),
    ("TUNNEL_PORTS", "443 https", "'https' is not a port such as 443 or a range of ports such as 8000-8999"),
    ("TUNNEL_PORTS", "9-8", "'9-8' is not a port"),
    ("TUNNEL_PORTS", "0", "'0' is not a port"),
    ("TUNNEL_PORTS", "1-70000", "'1-70000' is not a port"),
    ("TUNNEL_DENY", "*", "'*' is not a host name such as example.com or *.example.com"),
    ("MAX_UPLOADS", "0", "'0' is not a number from 1 to 1000000"),
    ("MAX_UPLOADS_PER_CLIENT", "many", "'many' is not a number from 1 to 1000000"),
    ("REGISTRY_READ_ONLY", "perhaps", "'perhaps' is "),
    ("REGISTRY_STORE", "/srv/images", "it does not begin with s3://BUCKET"),
    ("REGISTRY_STORE", "s3://images?endpoint=store:9000", "endpoint='store:9000' is not a URL"),
    ("REGISTRY_STORE", "s3://images?size=1", "'size' is no option"),
    ("ALLOW_DELETE", "none", "'none' is "),
    ("ALLOW_SPARSE_INDEXES", "2", "'2' is "),
    ("WORKERS", "0", "'0' is not a number from 1 to 64"),
    ("WORKERS", "two", "'two' is not a number from 1 to 64"),
    ("PULL_HISTORY", "none", "'none' is not a time such as 90s, 10m, 1h or 60d"),
    ("PULL_HISTORY", "0", "'0' is not allowed; use a time greater than zero"),
    ("LOG_FORMAT", "xml", "'xml' is not one of text, json"),
    ("STATE_DIR", "a\0b", "'a\\x00b' is not a path"),
    ("CA_KEY_PASSPHRASE", "\udce4SECRET", "is not UTF-8 text"),
    ("CA_CRT_FILE", "/etc/ca.crt", "is set and CA_KEY_FILE is not; set both CA_CRT_FILE and CA_KEY_FILE, or neither"),
    ("CA_KEY_FILE", "/etc/ca.key", "is set and CA_CRT_FILE is not"),
    (
        "REGISTRY_CRT_FILE",
        "/etc/a.crt",
        "is set and REGISTRY_KEY_FILE is not; set both REGISTRY_CRT_FILE and REGISTRY_KEY_FILE, or neither",
    ),
    ("REGISTRY_KEY_FILE", "/etc/a.key", "is set and REGISTRY_CRT_FILE is not"),
    ("PROXY_CRT_FILE", "/etc/a.crt", "is set and PROXY_KEY_FILE is not"),
    ("PROXY_KEY_FILE", "/etc/a.key", "is set and PROXY_CRT_FILE is not"),
    ("PROXY_TLS_LISTEN", "3129", "'3129' is not an endpoint such as tcp:3128"),
    ("PROXY_TLS_LISTEN", "ssl:3129", "write tcp:PORT in PROXY_TLS_LISTEN"),
]


@pytest.mark.parametrize(("name", "text", "part"), INVALID)
def test_invalid_value_gives_one_sentence(name: str, text: str, part: str) -> None:
    message = error_message(**{name: text})
    assert message.startswith(name)
    assert part in message
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 400
    assert "SEC" not in message.removeprefix(name)


# Errors contain no password


# A URL with a login may be misplaced in any setting. Bare words only in a setting that seems to take a login.
URLS = ["user:{}@host", "https://user:{}@host/x", "AUTH {} quay.io:u:{}@x"]
WORDS = ["quay.io:user:{}", "quay.io:u:a b:{}"]
LOGINS = ["AUTH_REGISTRIES", "UPSTREAM_PROXY", "CA_KEY_PASSPHRASE"]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, form) for name in NAMES for form in URLS),
        *((name, form) for name in ["REGISTRIES", *LOGINS] for form in WORDS),
    ],
)
def test_misplaced_credentials_do_not_leak(name: str, form: str) -> None:
    text = form.replace("{}", SECRET)
    try:
        parsed = settings(**{name: text})
    except SettingsError as error:
        assert SECRET not in str(error)
        assert error.__context__ is None or error.__suppress_context__  # a traceback shows the context
    else:
        if name in LOGINS:
            assert SECRET not in repr(parsed)


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_login_errors_never_contain_the_password(text: str) -> None:
    try:
        settings(AUTH_REGISTRIES=f"quay.io:user:{SECRET}{text} x")
    except SettingsError as error:
        assert re.fullmatch(
            r"AUTH_REGISTRIES: entry \d+( \(quay\.io(:\d+)?\))? [a-z ]+(; expected host:user:password)?\.",
            str(error),
        )


@given(st.sampled_from(NAMES), st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_only_settings_error_is_raised(name: str, text: str) -> None:
    try:
        parsed = settings(**{name: text})
    except SettingsError as error:
        assert str(error).startswith(name)
    else:
        assert isinstance(parsed, Settings)


# systemd credentials


@pytest.fixture
def credentials_directory(tmp_path: Path) -> Path:
    (tmp_path / "docker-registry-proxy.auth_registries").write_text("quay.io:me:from:systemd\nghcr.io:me:too\n")
    return tmp_path


def passwords_by_host(directory: Path, file: dict[str, str] | None = None, **env: str) -> dict[str, str]:
    logins = Settings.from_environment({"CREDENTIALS_DIRECTORY": str(directory), **env}, file or {}).auth_registries
    return {host.name: login.password for host, login in logins.items()}


def test_logins_from_a_systemd_credential(credentials_directory: Path) -> None:
    assert passwords_by_host(credentials_directory) == {"quay.io": "from:systemd", "ghcr.io": "too"}


def test_environment_and_file_override_a_systemd_credential(credentials_directory: Path) -> None:
    assert passwords_by_host(credentials_directory, AUTH_REGISTRIES="quay.io:me:mine") == {"quay.io": "mine"}
    assert passwords_by_host(credentials_directory, {"AUTH_REGISTRIES": "quay.io:me:mine"}) == {"quay.io": "mine"}
    assert passwords_by_host(credentials_directory, {"AUTH_REGISTRIES": ""}, AUTH_REGISTRIES=" ") == {
        "quay.io": "from:systemd",
        "ghcr.io": "too",
    }


def test_docker_config_from_a_systemd_credential(credentials_directory: Path) -> None:
    assert settings(CREDENTIALS_DIRECTORY=str(credentials_directory)).docker_config_file is None
    file = credentials_directory / "docker-registry-proxy.docker_config_file"
    file.write_text("{}")
    env = {"CREDENTIALS_DIRECTORY": str(credentials_directory)}
    assert settings(**env).docker_config_file == file
    assert settings(**env, DOCKER_CONFIG_FILE="/etc/docker.json").docker_config_file == Path("/etc/docker.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quay.io:pass", {"quay.io": "pass"}),
        ("*.pkg.dev:gcr registry.test:5000:ecr-login", {"*.pkg.dev": "gcr", "registry.test:5000": "ecr-login"}),
        ("https://index.docker.io/v1/:desktop docker.io:desktop", {"registry-1.docker.io": "desktop"}),
        ("[::1]:5000:a.b_c-D9", {"[::1]:5000": "a.b_c-D9"}),
        ("quay.io:pass quay.io:443:pass", {"quay.io": "pass"}),
    ],
)
def test_credential_helpers(text: str, expected: dict[str, str]) -> None:
    parsed = settings(CREDENTIAL_HELPERS=text).credential_helpers
    assert {str(host): helper for host, helper in parsed.items()} == expected


@pytest.mark.parametrize(
    "text",
    ["quay.io", "quay.io:", ":pass", "quay.io:5000", "quay.io:/bin/sh", "quay.io:../x", "quay.io:a/b", "quay.io:$(x)",
     "*:pass", "*.com:pass", "quay.io/team:pass", "quay.io:a quay.io:b", "docker.io:a index.docker.io:b"],
)  # fmt: skip
def test_bad_credential_helpers(text: str) -> None:
    with pytest.raises(SettingsError, match="CREDENTIAL_HELPERS: "):
        settings(CREDENTIAL_HELPERS=text)


def test_delimiters_apply_to_a_systemd_credential(credentials_directory: Path) -> None:
    (credentials_directory / "docker-registry-proxy.auth_registries").write_text(
        'gcr.io:::_json_key:::{"a": "b"};;;quay.io:::me:::word\n'
    )
    passwords = passwords_by_host(credentials_directory, AUTH_REGISTRIES_DELIMITER=";;;", AUTH_REGISTRY_DELIMITER=":::")
    assert passwords == {"gcr.io": '{"a": "b"}', "quay.io": "word"}


def test_missing_systemd_credential(tmp_path: Path) -> None:
    assert passwords_by_host(tmp_path) == {}
    assert passwords_by_host(tmp_path / "missing") == {}


def test_invalid_systemd_credential(credentials_directory: Path) -> None:
    file = credentials_directory / "docker-registry-proxy.auth_registries"
    file.write_bytes(b"quay.io:me:\xff")
    with pytest.raises(SettingsError, match=re.escape(f"{file} is not UTF-8 text.")):
        passwords_by_host(credentials_directory)
    file.write_text("quay.io:me")
    with pytest.raises(SettingsError, match=r"^AUTH_REGISTRIES: entry 1 \(quay.io\) has no password"):
        passwords_by_host(credentials_directory)
    file.unlink()
    file.mkdir()
    with pytest.raises(SettingsError, match=re.escape(f"{file} cannot be read: Is a directory.")):
        passwords_by_host(credentials_directory)


def test_overridden_env_file_line_gives_a_warning() -> None:
    file = {"PROXY_LISTEN": "tcp:8080", "WORKERS": "2", "REGISTRIES": "quay.io"}
    settings = Settings.from_environment({"PROXY_LISTEN": "systemd:domain=INET6:name=proxy", "WORKERS": "2"}, file)
    assert settings.warnings == (
        "PROXY_LISTEN in the .env file has no effect, because the environment sets it to another value.",
    )


def test_the_reserve_of_pulls() -> None:
    assert settings().rate_reserve == 20
    assert [settings(RATE_RESERVE=text).rate_reserve for text in ("0", "0%", "35 %", "100%")] == [0, 0, 35, 100]
    for text in ("-1", "101%", "20.5", "half", "%", "0x1", "\u0663%", "1000"):
        with pytest.raises(SettingsError, match=r"RATE_RESERVE: .* is not a percentage from 0% to 100%, such as 20%\."):
            settings(RATE_RESERVE=text)
    assert settings(PIN_FILE="pins").pin_file == Path("pins").absolute() and settings().pin_file is None


def test_the_credentials_of_a_bucket_are_no_unknown_names() -> None:
    """botocore reads them."""
    file = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "REGISTRIES": "quay.io", "UNKNOWN": "1"}
    assert unread_names(file) == ("UNKNOWN",)
