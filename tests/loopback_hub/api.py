"""The JSON routes: accounts, repositories, commits, references, discussions, Spaces."""

import base64
import json
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from .access import Refused, user_of
from .storage import File, Repo, git_oid, lfs_pointer

NOW = datetime(2026, 1, 1, tzinfo=UTC).isoformat().replace("+00:00", "Z")
BINARY = (".safetensors", ".bin", ".pt", ".png", ".zip")
LARGE = 10 * 2**20


class Api:
    """The routes around a hub; `{name}` is one path segment, still quoted."""

    def __init__(self, hub: Any):
        self.hub = hub

    def routes(self) -> list[Route]:
        repo = "/api/{kind}/{owner}/{name}"
        return [
            Route("/api/whoami-v2", self.whoami),
            Route("/api/repos/create", self.create, methods=["POST"]),
            Route("/api/validate-yaml", self.validate, methods=["POST"]),
            Route(repo, self.info),
            Route(repo + "/settings", self.settings, methods=["PUT"]),
            Route(repo + "/revision/{rev}", self.info),
            Route(repo + "/tree/{rev}", self.tree),
            Route(repo + "/tree/{rev}/{folder:path}", self.tree),
            Route(repo + "/paths-info/{rev}", self.paths_info, methods=["POST"]),
            Route(repo + "/commits/{rev}", self.commits),
            Route(repo + "/refs", self.refs),
            Route(repo + "/preupload/{rev}", self.preupload, methods=["POST"]),
            Route(repo + "/commit/{rev}", self.commit, methods=["POST"]),
            Route(repo + "/branch/{rev}", self.branch, methods=["POST", "DELETE"]),
            Route(repo + "/tag/{rev}", self.tag, methods=["POST", "DELETE"]),
            Route(repo + "/discussions", self.open_discussion, methods=["POST"]),
            Route(repo + "/discussions/{number:int}", self.discussion),
            Route(repo + "/discussions/{number:int}/merge", self.merge, methods=["POST"]),
            Route(repo + "/variables", self.variables, methods=["GET", "POST"]),
            Route(repo + "/runtime", self.runtime),
        ]

    # Accounts and repositories

    async def whoami(self, request: Request) -> Response:
        user = user_of(request, self.hub.users)
        if user is None:
            raise Refused(401, "Invalid username or password.")
        orgs = [{"name": name, "roleInOrg": role} for name, role in user.orgs.items()]
        token = {"displayName": "a token", "role": user.role}
        return JSONResponse({"type": "user", "name": user.name, "orgs": orgs, "auth": {"accessToken": token}})

    async def create(self, request: Request) -> Response:
        asked = await request.json()
        user = user_of(request, self.hub.users)
        owner = asked.get("organization") or (user and user.name)
        if user is None or not user.may("write", owner):
            where = f'under the namespace "{owner}"'
            raise Refused(403 if user else 401, f"You don't have the rights to create a model {where}")
        kind = asked.get("type", "model")
        key = (kind, f"{owner}/{asked['name']}")
        prefix = "" if kind == "model" else f"{kind}s/"
        url = {"url": f"{self.hub.url}/{prefix}{key[1]}", "name": key[1]}
        if key in self.hub.repos:
            return JSONResponse({"error": "You already created this repo", **url}, 409)
        repo = self.hub.repos[key] = Repo(*key, private=asked.get("visibility", "public") == "private")
        attributes = b"".join(b"*%s filter=lfs diff=lfs merge=lfs -text\n" % suffix.encode() for suffix in BINARY)
        repo.commit("main", "initial commit", {".gitattributes": self.regular(attributes)})
        repo.variables.update({row["key"]: row["value"] for row in asked.get("variables", [])})
        return JSONResponse(url)

    def regular(self, data: bytes) -> File:
        return File(self.hub.objects.add(data), len(data), git_oid(data), lfs=False)

    async def validate(self, request: Request) -> Response:
        """Refuses front matter that is no mapping, or results without a model's name."""
        content = (await request.json())["content"]
        _, begun, rest = ("\n" + content).partition("\n---\n")
        try:
            metadata = yaml.safe_load(rest.partition("\n---")[0]) if begun else {}
            problem = None if isinstance(metadata, dict) else "metadata should be an object"
        except yaml.YAMLError as error:
            problem, metadata = f"invalid YAML: {error}", {}
        if problem is None and any("name" not in entry for entry in metadata.get("model-index", [])):
            problem = '"model-index[0].name" is required'
        if problem:
            return JSONResponse({"errors": [{"message": problem}], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return JSONResponse({"errors": [], "warnings": warnings})

    def repo(self, request: Request, access: str = "read") -> Repo:
        """The repository of a request, if its token may. A private one is as good as not there to others."""
        user = user_of(request, self.hub.users)
        names = request.path_params
        kind = names.get("kind", "models").removesuffix("s")
        repo = self.hub.repos.get((kind, f"{names['owner']}/{names['name'].removesuffix('.git')}"))
        if repo is None or (repo.private and not (user and user.may("read", names["owner"]))):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if access == "write" and not (user and user.may("write", names["owner"])):
            raise Refused(403 if user else 401, "You don't have write access to this repository")
        return repo

    def revision(self, repo: Repo, request: Request) -> str:
        """The commit that the path's revision names."""
        revision = unquote(request.path_params.get("rev", "main"))
        commit = repo.resolve(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    async def info(self, request: Request) -> Response:
        repo = self.repo(request)
        commit = self.revision(repo, request)
        blobs = bool(request.query_params.get("blobs"))
        siblings = []
        for path, file in repo.files(commit).items():
            more = {"size": file.size, "blobId": file.oid} if blobs else {}
            if blobs and file.lfs:
                more["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
            siblings.append({"rfilename": path, **more})
        told = {"_id": "0", "id": repo.name, "modelId": repo.name, "sha": commit, "private": repo.private}
        return JSONResponse(told | {"lastModified": NOW, "createdAt": NOW, "siblings": siblings, "tags": []})

    async def settings(self, request: Request) -> Response:
        repo = self.repo(request, "write")
        repo.private = (await request.json())["visibility"] == "private"
        return JSONResponse({})

    async def tree(self, request: Request) -> Response:
        """Every file, or those in a folder, a page at a time."""
        repo = self.repo(request)
        folder = f"{request.path_params['folder']}/" if "folder" in request.path_params else ""
        files = {
            path: file for path, file in repo.files(self.revision(repo, request)).items() if path.startswith(folder)
        }
        if folder and not files:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        start, size = int(request.query_params.get("cursor", 0)), self.hub.page_size
        rows = [files[path].described(path) | self.xet_hash(files[path]) for path in sorted(files)]
        more = f"<{self.hub.url}{request.url.path}?recursive=true&cursor={start + size}>"
        headers = {"Link": f'{more}; rel="next"'} if start + size < len(rows) else {}
        return JSONResponse(rows[start : start + size], headers=headers)

    def xet_hash(self, file: File) -> dict:
        found = self.hub.xet_hash(file.sha256) if file.lfs else None
        return {"xetHash": found} if found else {}

    async def paths_info(self, request: Request) -> Response:
        repo = self.repo(request)
        files = repo.files(self.revision(repo, request))
        paths = (await request.form()).getlist("paths")
        return JSONResponse([files[str(path)].described(str(path)) for path in paths if path in files])

    async def commits(self, request: Request) -> Response:
        repo = self.repo(request)
        history = repo.history(self.revision(repo, request))
        about = {"date": NOW, "message": "", "authors": [{"user": "somebody"}]}
        return JSONResponse([{"id": commit, "title": repo.commits[commit].title, **about} for commit in history])

    # Commits

    async def preupload(self, request: Request) -> Response:
        pull = "create_pr" in request.query_params
        repo = self.repo(request, "read" if pull else "write")
        files = repo.files(self.revision(repo, request))
        told = []
        for asked in (await request.json())["files"]:
            path, old = asked["path"], files.get(asked["path"])
            large = path.endswith(BINARY) or asked["size"] > LARGE
            oid = None if old is None else old.sha256 if old.lfs else old.oid
            mode = "lfs" if large else "regular"
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return JSONResponse({"files": told})

    async def commit(self, request: Request) -> Response:
        """All of a commit or nothing of it."""
        pull = "create_pr" in request.query_params
        repo = self.repo(request, "read" if pull else "write")
        head, *operations = [json.loads(line) for line in (await request.body()).splitlines() if line]
        parent, base = head["value"].get("parentCommit"), self.revision(repo, request)
        if parent is not None and parent != base:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files(base))
        for operation in operations:
            self.apply(operation["key"], operation["value"], files)
        if pull:
            return self.commit_to_pull(repo, base, head["value"]["summary"], files)
        branch = unquote(request.path_params["rev"])
        if branch not in repo.branches:
            raise Refused(400, f"{branch} is not a branch")
        commit = repo.commit(branch, head["value"]["summary"], files)
        return JSONResponse(self.committed(repo, commit))

    def apply(self, key: str, value: dict, files: dict[str, File]) -> None:
        """One line of a commit, on the files so far."""
        path = value["path"]
        if ".." in path.split("/") or path.startswith("/") or "\\" in path or "//" in path:
            raise Refused(400, f"Invalid path: {path}")
        if key == "file":
            files[path] = self.regular(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[path] = self.large(value["oid"])
        elif key == "deletedFile":
            del files[path]
        else:
            assert key == "deletedFolder", key
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]

    def large(self, sha256: str) -> File:
        size = self.hub.size_of(sha256)
        if size is None:
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        return File(sha256, size, git_oid(lfs_pointer(sha256, size)), lfs=True)

    def commit_to_pull(self, repo: Repo, base: str, title: str, files: dict[str, File]) -> Response:
        number = self.new_pull(repo, base, title)
        commit = repo.commit(f"refs/pr/{number}", title, files)
        url = f"{self.hub.url}/{repo.name}/discussions/{number}"
        return JSONResponse(self.committed(repo, commit) | {"pullRequestUrl": url})

    def committed(self, repo: Repo, commit: str) -> dict:
        prefix = "" if repo.kind == "model" else f"{repo.kind}s/"
        url = f"{self.hub.url}/{prefix}{repo.name}/commit/{commit}"
        return {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""}

    # References and pull requests

    async def refs(self, request: Request) -> Response:
        repo = self.repo(request)

        def rows(names: dict[str, str], prefix: str) -> list[dict]:
            return [{"name": name, "ref": prefix + name, "targetCommit": commit} for name, commit in names.items()]

        heads = {name: commit for name, commit in repo.branches.items() if not name.startswith("refs/pr/")}
        pulls = {name: commit for name, commit in repo.branches.items() if name.startswith("refs/pr/")}
        told = {"branches": rows(heads, "refs/heads/"), "tags": rows(repo.tags, "refs/tags/"), "converts": []}
        return JSONResponse(told | {"pullRequests": rows(pulls, "")})

    async def branch(self, request: Request) -> Response:
        repo = self.repo(request, "write")
        name = unquote(request.path_params["rev"])
        if request.method == "DELETE":
            del repo.branches[name]
        elif name in repo.branches:
            raise Refused(409, f"Reference already exists: {name}")
        else:
            start = json.loads(await request.body() or b"{}").get("startingPoint", "main")
            repo.branches[name] = repo.resolve(start) or self.revision(repo, request)
        return PlainTextResponse("")

    async def tag(self, request: Request) -> Response:
        repo = self.repo(request, "write")
        if request.method == "DELETE":
            del repo.tags[unquote(request.path_params["rev"])]
            return PlainTextResponse("")
        name = (await request.json())["tag"]
        if name in repo.tags:
            raise Refused(409, f"Tag {name} already exists")
        repo.tags[name] = self.revision(repo, request)
        return PlainTextResponse("")

    def new_pull(self, repo: Repo, base: str, title: str) -> int:
        number = len(repo.pulls) + 1
        repo.pulls[number] = {"title": title, "status": "open"}
        repo.branches[f"refs/pr/{number}"] = base
        return number

    async def open_discussion(self, request: Request) -> Response:
        repo = self.repo(request)
        number = self.new_pull(repo, repo.branches["main"], (await request.json())["title"])
        return JSONResponse({"num": number})

    async def discussion(self, request: Request) -> Response:
        repo, number = self.repo(request), request.path_params["number"]
        about = {"num": number, "createdAt": NOW, "isPullRequest": True, "events": [], "filesWithConflicts": []}
        names = {"repo": {"name": repo.name, "type": repo.kind}, "author": {"name": "somebody"}}
        return JSONResponse(repo.pulls[number] | about | names | {"changes": {"base": "refs/heads/main"}})

    async def merge(self, request: Request) -> Response:
        repo, number = self.repo(request, "write"), request.path_params["number"]
        head = f"refs/pr/{number}"
        if repo.branches["main"] not in repo.history(head):
            raise Refused(409, "This pull request has conflicts")
        repo.branches["main"] = repo.branches[head]
        repo.pulls[number]["status"] = "merged"
        return JSONResponse({})

    # Spaces

    async def variables(self, request: Request) -> Response:
        repo = self.repo(request, "write")
        if request.method == "POST":
            asked = await request.json()
            repo.variables[asked["key"]] = asked["value"]
        return JSONResponse({key: {"key": key, "value": value} for key, value in repo.variables.items()})

    async def runtime(self, request: Request) -> Response:
        """The next stage that the test has planned; the last one stays."""
        repo = self.repo(request)
        stage = repo.stages.pop(0) if len(repo.stages) > 1 else repo.stages[0]
        more = {"errorMessage": "No module named 'gradio'"} if stage.endswith("_ERROR") else {}
        return JSONResponse({"stage": stage, "hardware": {"current": "cpu-basic", "requested": "cpu-basic"}} | more)
