"""The packages that the pictures come from: their versions, hashes and licences, and how npm and apt fetch them."""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..folders import whole_folder


@dataclass(frozen=True)
class Package:
    """A version of a package, its licence (SPDX), and the hash of its archive as npm writes it, or its SHA-256."""

    version: str
    licence: str
    integrity: str


PACKAGES = {
    "an-array-of-english-words": Package(
        "2.0.0",
        "MIT",
        "sha512-FXnNvZSOI27kkKXeLSquhaTGP7z198UOQ4txaYO9fCfrjCh+D5SV7G7XqzEH0229+pAi4cjBEZ4WIQYgjKtO7Q==",
    ),
    "emojibase-data": Package(
        "17.0.0",
        "MIT",
        "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    ),
    "@fontsource/bangers": Package(
        "5.3.0",
        "OFL-1.1",
        "sha512-tSRpmWwkqrO9PCqo9wjA/99/5sLOIWm5cf51G3ooEHd8qZus8sVSSJoWp/7EvM5rIgZMjKRG6XtY9yeisKxE7g==",
    ),
    "@fontsource/caveat": Package(
        "5.3.0",
        "OFL-1.1",
        "sha512-eHTfzQxFSW9ABERRLNruHoNJmKed2J7pqTUc5lp4a4POMgXGKpxmWj3d9Hz10kmAg6iuTTLe6UagbA4bnsmfQw==",
    ),
    "@fontsource/lora": Package(
        "5.3.0",
        "OFL-1.1",
        "sha512-OK1g1z01rHVPqO5aw/FOIoDqc46KKYZdgL3NOLkxLWDk6QhDHhdr/h2BV1cke6gTvR1tzpDfdKyUkGsC+sQLeQ==",
    ),
    "@fontsource/merriweather": Package(
        "5.3.0",
        "OFL-1.1",
        "sha512-9LpPsNTYzRALj468Uj1K9Usl5eXk991L/kKmcpdWbTF1na9NfMyAXMgUABlMReViU1MYBz9kJ8jEzEOtX9qGDg==",
    ),
    "@fontsource/nunito": Package(
        "5.3.0",
        "OFL-1.1",
        "sha512-vw9TaTQJ/zpEpKrsODuPmOvaVjXgdda6B+xXA4YqjrdeJ62MLgVoDerdRXFQHyBnSCt2yQ2nHKCHPP/Pv7Xq4Q==",
    ),
    "@fontsource/oswald": Package(
        "5.3.0",
        "OFL-1.1",
        "sha512-16r2aHActe0pH+9FLdk/74/YxXM7HpGak05kAzx3RvSToiJwGvyhv6GvckPz+YuZmvL1nxWbEop2jAXRcXYPRg==",
    ),
    "@fontsource/playfair-display": Package(
        "5.3.0",
        "OFL-1.1",
        "sha512-uJSABalvdWc10fEPppQjQocamT21LEyRfzzWfRfqbkPz+sRv+kKpYDKyluBUskvJREkJTos9epj1WjQROGu99Q==",
    ),
    "@fontsource/roboto": Package(
        "5.3.0",
        "OFL-1.1",
        "sha512-BapRJOWYP+LZ21zp+wBQjfpPYKRoxc4LspJ/RLuI+HSMBD5u/X4O+ESDrSvEqDSy0rAl7GwBJ+09mdc16cVQ1Q==",
    ),
    "@fontsource/roboto-mono": Package(
        "5.3.0",
        "OFL-1.1",
        "sha512-yhwplHMHW9dCk+1pZuERfcJe+K3rosGVZEoK0XktkxRSqQ9qsipSwwiuW2/8Qmtp9lzu3Ixa/ie4BMH3i8CkZQ==",
    ),
    "@fontsource/special-elite": Package(
        "5.3.0",
        "Apache-2.0",
        "sha512-fOQ9XU8m4KnqzcLibAXCxTsKzbxePNDjPqVss5GSMcPVCY1TuCv+Wq8gm1ebqIR6XS1rhMbQ7ECP9ocKVEEpTA==",
    ),
    "@iconify-json/emojione": Package(
        "1.2.3",
        "CC-BY-4.0",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    "@iconify-json/fxemoji": Package(
        "1.2.2",
        "Apache-2.0",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
    ),
    "@iconify-json/game-icons": Package(
        "1.2.4",
        "CC-BY-3.0",
        "sha512-/HDDZxowXgDJcOEwPspUCq5RuDdl25OyZKdtxqqiPJQNTrWIym7r4StLzIVs77DyNzOWWhH5wDqwYR3WHeDfkg==",
    ),
    "@iconify-json/noto": Package(
        "1.2.9",
        "Apache-2.0",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "@iconify-json/noto-v1": Package(
        "1.2.5",
        "Apache-2.0",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
    "@iconify-json/openmoji": Package(
        "1.2.29",
        "CC-BY-SA-4.0",
        "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
    ),
    "@iconify-json/twemoji": Package(
        "1.2.5",
        "CC-BY-4.0",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "@lobehub/fluent-emoji-3d": Package(
        "1.1.0",
        "MIT",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
    "spdx-license-list": Package(
        "6.12.0",
        "CC0-1.0",
        "sha512-+nUYqm3aZMSHbjsthK+i/HHI2okTElCvqwUd4k8QcSk+FTGgjq+fsdFj2wZOaX6XmR2JdWhf/NeflNnvKOjcnQ==",
    ),
    "svg-cards": Package(
        "4.0.2",
        "LGPL-2.1",
        "sha512-YQVC0+bVQtvGbKoQZAHPgVSrKUymPK+aG9NQjJul9jp/a+lFcm8aWKh7YmKVinSjpaBTbogTLKAPi5YQEFRYLg==",
    ),
    "us-atlas": Package(
        "3.0.1",
        "ISC",
        "sha512-wEIZCq0ImPvGblTd8gZMqNNCPkQshugMUG/8nkSWXb02+XqNFREg9atHOKP9w6prLZTpqcLhSvdBW81MkV3/0Q==",
    ),
    "vega-datasets": Package(
        "3.2.1",
        "BSD-3-Clause",
        "sha512-lTSwZA6yq6qSU2YZm+6bqILiIvTPPxn4itir7jPGFmHIdPvUfQ9pCzzcrklYywMJgLUbaIeSkZQdiJd6wBxPug==",
    ),
    "world-atlas": Package(
        "2.0.2",
        "ISC",
        "sha512-IXfV0qwlKXpckz1FhwXVwKRjiIhOnWttOskm5CtxMsjgE/MXAYRHWJqgXOpM8IkcPBoXnyTU5lFHcYa5ChG0LQ==",
    ),
}

# Of Debian 12; what they are for is left out where apt does not have them.
DEBIAN = {
    "debian-policy": Package(
        "4.6.2.0", "GPL-2.0-or-later", "ef9d01b625c3b87c3a845c2cd1b66f1a16e9240b2b9e5bee53472a00e8457a39"
    ),
    "developers-reference": Package(
        "12.18", "GPL-2.0-or-later", "0dba82f6fa16e373f2a84ad07e7971aa9264ad2e7d2ae46b37edbc9c5fd57e2e"
    ),
    "mpich-doc": Package("4.0.2-3", "mpich2", "2d3e8f2feb4b28888412ebde2cfdaa3972753eaeba126ef90bc9bae95c7266de"),
    "openclipart-svg": Package(
        "1:0.18+dfsg-19", "CC0-1.0", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5"
    ),
    "xorg-docs": Package("1:1.7.1-1.2", "MIT", "4842f9de2722d4a1998d8c8b1d14ef475fbc5e16db7d0954b4c0f5f72bd67440"),
}


def package_folder(name: str, root: Path) -> Path:
    """The folder of a package under `root`, which is laid out like `node_modules`; fetched with npm if missing.

    Raises ValueError for another version, or if npm's archive does not have the pinned hash; OSError if npm is missing
    or cannot fetch it.
    """
    package, folder = PACKAGES[name], root / name
    if not folder.exists():
        fetch(name, package, folder)
    version = json.loads((folder / "package.json").read_text(encoding="utf-8")).get("version")
    if version != package.version:
        raise ValueError(f"{folder} is version {version}; the suite is made of {package.version}: remove the folder.")
    return folder


def fetch(name: str, package: Package, folder: Path) -> None:
    """Fetches a package's archive with npm, checks its hash, and unpacks it."""
    npm = shutil.which("npm")
    if npm is None:
        raise OSError(
            f"There is no npm to fetch {name} with: install it, or unpack {name} {package.version} in {folder}."
        )
    with tempfile.TemporaryDirectory() as place:
        command = [npm, "pack", "--silent", f"{name}@{package.version}", "--pack-destination", place]
        done = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(place).glob("*.tgz"))
        if done.returncode or not archives:
            raise OSError(f"npm cannot fetch {name}@{package.version}: {' '.join(done.stderr.split()) or 'no archive'}")
        digest = base64.b64encode(hashlib.sha512(archives[0].read_bytes()).digest()).decode()
        if f"sha512-{digest}" != package.integrity:
            raise ValueError(f"The archive of {name}@{package.version} is not the pinned one: its hash differs.")
        with whole_folder(folder) as partial, tarfile.open(archives[0]) as archive:
            archive.extractall(Path(place), filter="data")
            shutil.copytree(Path(place) / "package", partial, dirs_exist_ok=True)


def debian_folder(name: str, root: Path) -> Path | None:
    """The folder of one of Debian's packages under `root`; None if it is not there and apt cannot fetch this version.

    Raises ValueError if the archive is not the pinned one.
    """
    package, folder = DEBIAN[name], root / "debian" / name
    if folder.is_dir():
        return folder
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None
    with tempfile.TemporaryDirectory() as place:
        wanted = f"{name}={package.version}"
        subprocess.run(["apt-get", "download", wanted], cwd=place, capture_output=True)
        archives = list(Path(place).glob("*.deb"))
        if not archives:
            return None
        if hashlib.sha256(archives[0].read_bytes()).hexdigest() != package.integrity:
            raise ValueError(f"The archive of {wanted} is not the pinned one: its hash differs.")
        with whole_folder(folder) as partial:
            subprocess.run(["dpkg-deb", "-x", archives[0], partial], check=True)
    return folder
