"""A server of Weights & Biases on the loopback address: artifacts, up and down, as wandb asks for them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlparse

from hf_stand_in import serving

KEY = "5" * 40
DATE = "2026-01-01T00:00:00"


def b64md5(contents: bytes) -> str:
    return base64.b64encode(hashlib.md5(contents).digest()).decode()


class Artifacts:
    """Artifacts in memory: NAME -> versions, each a mapping of its files.

    Attributes:
        aliases: NAME -> alias -> version.
        stated: name of a file -> what the manifest says in place of the truth.
        answer: path of an address -> a function that answers for it.
        stored: what was uploaded, by its address.
        seen: names of queries and paths, one line each; keys: of each request.
        mutations: what was asked to be written, with its variables.
    """

    def __init__(self) -> None:
        self.artifacts: dict[str, list[dict[str, bytes]]] = {}
        self.types: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        self.aliases: dict[str, dict[str, int]] = {}
        self.stated: dict[str, dict[str, Any]] = {}
        self.answer: dict[str, Any] = {}
        self.stored: dict[str, bytes] = {}
        self.sent: dict[str, Any] = {}
        self.drafts: dict[str, dict[str, Any]] = {}
        self.used: list[str] = []
        self.seen: list[str] = []
        self.mutations: list[tuple[str, Any]] = []
        self.urls: dict[str, str] = {}
        self.counted = 0
        self.refuses = 0
        self.url = ""

    def put(self, name: str, files: dict[str, bytes], *aliases: str) -> None:
        versions = self.artifacts.setdefault(name, [])
        versions.append(dict(files))
        for alias in ("latest", *aliases):
            self.aliases.setdefault(name, {})[alias] = len(versions) - 1

    def manifest(self, name: str, number: int) -> dict[str, Any]:
        files = self.artifacts[name][number]
        contents = {
            n: {"digest": b64md5(f), "size": len(f), "birthArtifactID": "1"} for n, f in files.items()
        }
        for file, told in self.stated.items():
            contents[file] = {**contents.get(file, {"digest": b64md5(b""), "size": 0}), **told}
        policy = {"storagePolicy": "wandb-storage-policy-v1", "storagePolicyConfig": {"storageLayout": "V2"}}
        return {"version": 1, **policy, "contents": contents}


def _handler(hub: Artifacts) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlparse(self.path).path
            if path == "/graphql":
                return self.graphql(json.loads(self.body))
            hub.seen.append(f"{self.command} {path}")
            if path in hub.answer:
                return hub.answer[path](self)
            if self.command == "PUT":
                hub.stored[path] = self.body
                return self.send(b"")
            if path.startswith("/kept/"):
                _, _, name, number, file = path.split("/", 4)
                if file == "manifest":
                    return self.send(json.dumps(hub.manifest(name, int(number))).encode())
                return self.send(hub.artifacts[name][int(number)].get(file, b""))
            self.send(b"{}")

        do_GET = do_POST = do_PUT = do_HEAD = do

        def graphql(self, asked: dict[str, Any]) -> None:
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            operation, variables = (name[1] if name else ""), asked.get("variables") or {}
            hub.seen.append(operation)
            key = base64.b64decode((self.headers.get("Authorization") or "").removeprefix("Basic ")).decode()
            if hub.refuses:
                return self.send(b'{"errors":[{"message":"permission denied"}]}', hub.refuses)
            if key != f"api:{KEY}":
                return self.send(b'{"errors":[{"message":"invalid api key"}]}', 401)
            if asked["query"].lstrip().startswith("mutation"):
                hub.mutations.append((operation, variables))
            answer = getattr(self, f"_{operation}", None)
            self.send(json.dumps({"data": answer(variables) if answer else {}}).encode())

        def _Viewer(self, asked: Any) -> Any:
            me = {
                "id": "VXNlcjox",
                "entity": "me",
                "username": "me",
                "email": "",
                "flags": "{}",
                "admin": False,
            }
            return {"viewer": {**me, "name": "me", "teams": {"edges": [{"node": {"name": "me"}}]}}}

        def _GetDefaultEntity(self, asked: Any) -> Any:
            return {"viewer": {"id": "1", "entity": "me"}}

        def _ServerFeaturesQuery(self, asked: Any) -> Any:
            return {"serverInfo": {"features": []}}

        def _UpsertBucket(self, asked: Any) -> Any:
            project = {
                "id": "UHJvamVjdDox",
                "name": asked["project"],
                "entity": {"id": "RW50aXR5OjE=", "name": "me"},
            }
            bucket = {
                "id": "QnVja2V0OjE=",
                "name": asked["name"],
                "displayName": asked["name"],
                "description": "",
            }
            bucket |= {"config": "{}", "sweepName": None, "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"inserted": True, "bucket": bucket}}

        def _CreateRunFiles(self, asked: Any) -> Any:
            files = [{"name": f, "uploadUrl": f"{hub.url}/run/{f}"} for f in asked["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}

        def _ArtifactType(self, asked: Any) -> Any:
            kind = hub.types.get(asked["name"].partition(":")[0])
            return {"project": {"artifact": {"artifactType": {"name": kind}} if kind else None}}

        def _ArtifactMembershipByName(self, asked: Any) -> Any:
            name, _, alias = asked["name"].partition(":")
            number = hub.aliases.get(name, {}).get(alias)
            if (
                alias.startswith("v")
                and alias[1:].isdecimal()
                and int(alias[1:]) < len(hub.artifacts.get(name, []))
            ):
                number = int(alias[1:])
            if number is None:
                return {"project": {"artifactCollectionMembership": None}}
            artifact = self.about(name, number, asked["entity"], asked["project"])
            membership = {"__typename": "ArtifactCollectionMembership", "id": "1", "versionIndex": number}
            membership |= {
                "createdAt": DATE,
                "aliases": [],
                "artifactCollection": artifact["artifactSequence"],
            }
            return {"project": {"artifactCollectionMembership": {**membership, "artifact": artifact}}}

        def _ArtifactByID(self, asked: Any) -> Any:
            name, number = asked["id"].split("/")
            return {"artifact": {**self.about(name, int(number), "me", "p"), "aliases": []}}

        def about(self, name: str, number: int, entity: str, project: str) -> dict[str, Any]:
            owner = {"id": "1", "internalId": "1", "name": project, "entity": {"name": entity}}
            files = hub.artifacts[name][number]
            return {
                "__typename": "Artifact", "id": f"{name}/{number}", "versionIndex": number, "tags": [],
                "artifactSequence": {"__typename": "ArtifactSequence", "name": name, "project": owner},
                "artifactType": {"name": hub.types.get(name, "model")}, "description": None,
                "metadata": hub.metadata.get(name, "{}"), "ttlDurationSeconds": -2, "ttlIsInherited": True,
                "historyStep": None, "state": "COMMITTED", "size": sum(map(len, files.values())),
                "digest": "0", "digestAlgorithm": "MANIFEST_MD5", "commitHash": "0",
                "fileCount": hub.counted or len(files), "createdAt": DATE, "updatedAt": None,
            }  # fmt: skip

        def _FetchArtifactManifest(self, asked: Any) -> Any:
            file = {"directUrl": f"{hub.url}/kept/{asked['id']}/manifest"}
            return {"artifact": {"currentManifest": {"file": file}}}

        def _ArtifactMembershipFiles(self, asked: Any) -> Any:
            name, number = asked["collection"], self.number(asked["collection"], asked["alias"])
            empty = dict.fromkeys(("url", "storagePath", "mimetype", "digest", "md5"), "")
            empty |= {"__typename": "File", "sizeBytes": 1}
            edges = [
                {"node": {**empty, "id": file, "name": file, "updatedAt": None,
                          "directUrl": hub.urls.get(file, f"{hub.url}/kept/{name}/{number}/{file}")}}
                for file in asked["fileNames"]
            ]  # fmt: skip
            files = {"totalCount": len(edges), "edges": edges}
            files["pageInfo"] = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
            membership = {"artifactMembership": {"files": files}}
            return {"project": {"artifactCollection": {"__typename": "ArtifactSequence", **membership}}}

        def _CreateArtifact(self, asked: Any) -> Any:
            given = asked["input"]
            names = given.get("artifactCollectionNames") or [given.get("artifactCollectionName")]
            draft = f"{names[0]}/{len(hub.artifacts.get(names[0], []))}"
            hub.drafts[draft] = {**given, "files": {}}
            hub.types[names[0]] = given["artifactTypeName"]
            hub.metadata[names[0]] = given.get("metadata") or "{}"
            artifact = {
                "id": draft,
                "state": "PENDING",
                "artifactSequence": {"id": "1", "latestArtifact": None},
            }
            return {"createArtifact": {"artifact": artifact}}

        def _CreateArtifactManifest(self, asked: Any) -> Any:
            file = {"id": "1", "name": "manifest", "displayName": "manifest", "uploadHeaders": []}
            file["uploadUrl"] = (
                f"{hub.url}/up/{asked['artifactID']}/manifest" if asked["includeUpload"] else None
            )
            manifest = {"id": asked["artifactID"], "file": file}
            return {"createArtifactManifest": {"artifactManifest": manifest}}

        def _UpdateArtifactManifest(self, asked: Any) -> Any:
            file = {"id": "1", "name": "manifest", "displayName": "manifest", "uploadHeaders": []}
            file["uploadUrl"] = f"{hub.url}/up/{asked['artifactManifestID']}/manifest"
            manifest = {"id": asked["artifactManifestID"], "file": file}
            return {"updateArtifactManifest": {"artifactManifest": manifest}}

        def _CreateArtifactFiles(self, asked: Any) -> Any:
            edges = [
                {"node": {"id": "1", "name": f["name"], "displayName": f["name"], "storagePath": f["name"],
                          "uploadUrl": f"{hub.url}/up/{f['artifactID']}/{f['name']}", "uploadHeaders": [],
                          "uploadMultipartUrls": None, "artifact": {"id": f["artifactID"]}}}
                for f in asked["input"]["artifactFiles"]
            ]  # fmt: skip
            return {"createArtifactFiles": {"files": {"edges": edges}}}

        def _CommitArtifact(self, asked: Any) -> Any:
            draft = hub.drafts[asked["artifactID"]]
            name, start = asked["artifactID"].partition("/")[0], f"/up/{asked['artifactID']}/"
            files = {p.removeprefix(start): b for p, b in hub.stored.items() if p.startswith(start)}
            hub.sent[name] = json.loads(files.pop("manifest"))
            hub.put(name, files, *[a["alias"] for a in draft.get("aliases") or []])
            return {"commitArtifact": {"artifact": {"id": asked["artifactID"], "digest": "0"}}}

        def _UseArtifact(self, asked: Any) -> Any:
            hub.used.append(asked["input"]["artifactID"])
            return {"useArtifact": {"artifact": {"id": asked["input"]["artifactID"], "digest": "0"}}}

        def number(self, name: str, alias: str) -> int:
            return int(alias[1:]) if alias[1:].isdecimal() else hub.aliases[name][alias]

        def send(self, out: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(out)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(out)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def wandb_hub() -> Any:
    """A server of artifacts within this context."""
    hub = Artifacts()
    return serving(hub, _handler(hub))
