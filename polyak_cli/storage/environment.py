"""The variables by which stores are found: those that no request can carry are refused by name.

Also finds the emulator of Google's storage, which obstore has no variable for.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any
from urllib.parse import urlsplit

from polyak_cli.errors import PolyakError

#: Variables that obstore sends or makes addresses of, by scheme, and those of them that are one.
_SENT = {
    "s3": re.compile(r"AWS_((ACCESS|SECRET|SESSION|ENDPOINT)_.*|(DEFAULT_)?REGION)"),
    "gs": re.compile("STORAGE_EMULATOR_HOST"),
    "az": re.compile("AZURE_(STORAGE_.*|ENDPOINT)"),
    "hf": re.compile("HF_(TOKEN|ENDPOINT)"),
}
_ADDRESS = re.compile(".*_(ENDPOINT|ENDPOINT_URL|ENDPOINT_URL_S3|HOST)")


def check_environment(scheme: str) -> None:
    """Refuse settings of a service that no request can carry: obstore would end with a trace.

    Raises:
        PolyakError: names the variable; its value may be a secret.
    """
    for name, value in os.environ.items():
        if scheme not in _SENT or not value or not _SENT[scheme].fullmatch(name):
            continue
        if name == "HF_TOKEN":
            value = value.strip()  # as the Hub's own library does, and `hub`
        if not (value.isascii() and value.isprintable()):
            raise PolyakError(
                f"{name}: holds a line break, or another character that no request can carry; set "
                "it without"
            )
        if _ADDRESS.fullmatch(name) and not _is_address(value, bare=scheme == "gs"):
            raise PolyakError(f"{name}: is no address; expected http://HOST:PORT or https://HOST")


def _is_address(text: str, *, bare: bool) -> bool:
    """Return whether a text is the address of a server; ``bare`` allows one without a scheme."""
    text = f"http://{text}" if bare and "://" not in text else text
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no port, or no IP address
        return False


def find_emulator(options: Any) -> dict[str, str]:
    """Return how Google's storage is reached where the environment names an emulator of it.

    The variable is that of Google's own clients; an emulator gets no credentials.
    """
    base = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
    if not base:
        return {}
    base = base if "://" in base else f"http://{base}"
    options["allow_http"] = base.startswith("http:")
    nobody = {"client_email": "", "private_key": "", "private_key_id": ""}
    found = {"gcs_base_url": base, "disable_oauth": True, **nobody}
    return {"service_account_key": json.dumps(found)}
