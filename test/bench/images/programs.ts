// Texts of the small programs and settings that the benchmark's images carry beside their packages.

/** One request through a Django application that imports what such a service imports. */
export const SERVICE = `import io
import time

began = time.monotonic()

import celery
import django
import lxml.etree
import numpy
import pandas
import psycopg2
import redis
import requests
import yaml
from cryptography.fernet import Fernet
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.urls import path
from PIL import Image

settings.configure(
    SECRET_KEY="bench",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    USE_TZ=True,
    TIME_ZONE="Europe/Berlin",
    DATABASES={"default": {"ENGINE": "django.db.backends.postgresql", "NAME": "service"}},
    INSTALLED_APPS=[
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
        "django.contrib.admin",
        "django.contrib.messages",
        "rest_framework",
    ],
    MIDDLEWARE=["django.middleware.security.SecurityMiddleware", "django.middleware.common.CommonMiddleware"],
    REST_FRAMEWORK={"DEFAULT_AUTHENTICATION_CLASSES": [], "UNAUTHENTICATED_USER": None},
)
application = get_wsgi_application()

from rest_framework.decorators import api_view
from rest_framework.response import Response

tasks = celery.Celery("service", broker="memory://")
cipher = Fernet(Fernet.generate_key())


@api_view(["GET"])
def report(request):
    frame = pandas.DataFrame({"day": pandas.date_range("2024-01-01", periods=90, tz="Europe/Berlin")})
    frame["value"] = numpy.sin(numpy.arange(90)) ** 2
    picture = io.BytesIO()
    Image.fromarray((numpy.outer(frame["value"], frame["value"]) * 255).astype("uint8")).save(picture, "PNG")
    monthly = frame.groupby(frame["day"].dt.month)["value"].mean()
    token = cipher.encrypt(yaml.safe_dump({"bytes": picture.tell()}).encode())
    return Response({"monthly": monthly.round(4).to_dict(), "token": len(token)})


urlpatterns = [path("report", report)]

from django.test import Client

reply = Client().get("/report")
print(f"ready {reply.status_code} {len(reply.content)} after {time.monotonic() - began:.3f} s", flush=True)
`;

export const NGINX_SITE = `server {
    listen 80 default_server;
    server_name _;
    root /var/lib/mediawiki;
    index index.php;
    location / {
        try_files $uri $uri/ /index.php?$args;
    }
    location ~ \\.php$ {
        include snippets/fastcgi-php.conf;
        fastcgi_pass unix:/run/php/php8.2-fpm.sock;
    }
}
`;

export const WEB_ENTRYPOINT = `#!/bin/sh
set -e
mkdir -p /run/php
php-fpm8.2 --daemonize
exec nginx -g 'daemon off;'
`;

/** The data directory is made at the first start, as the official images do. */
export const DATABASE_ENTRYPOINT = `#!/bin/sh
set -e
if [ "$(id -u)" = 0 ]; then
    install -d -m 700 -o postgres -g postgres "$PGDATA"
    install -d -m 2775 -o postgres -g postgres /run/postgresql
    exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
fi
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    initdb --username=postgres --auth-local=trust --auth-host=scram-sha-256
fi
exec "$@" -c listen_addresses='*'
`;

const PROGRAM = `#include <algorithm>
#include <iostream>
#include <map>
#include <string>
#include <vector>
int main() {
  std::map<std::string, std::vector<int>> words;
  for (int i = 0; i < 1000; i++) words[std::to_string(i % 7)].push_back(i);
  for (auto& [word, places] : words) std::sort(places.begin(), places.end(), std::greater<>());
  std::cout << "ready " << words["3"].front() << std::endl;
}
`;

const MAKEFILE = `main: main.o
\\tg++ -o main main.o
main.o: main.cpp
\\tg++ -O2 -Wall -c main.cpp
`;

/** Compiles, links and runs a small C++ program through make. */
export const COMPILE_COMMAND = [
  'sh',
  '-ec',
  `mkdir -p /tmp/program && cd /tmp/program
cat > main.cpp <<'END'
${PROGRAM}END
printf '${MAKEFILE.replaceAll('\n', '\\n')}' > Makefile
make -s
./main`,
];

/**
 * Starts as a model server does: imports its framework, reads the head of every large file, then maps them and reads
 * scattered ranges. Which ranges depends on nothing but the files' sizes.
 */
export const MODEL_SERVER = `import mmap
import os
import random
import time
import zlib

began = time.monotonic()

import numpy
import torch

LARGE = 64 * 1024 * 1024
RANGES = 400
RANGE = 64 * 1024

large = []
for directory, _, names in sorted(os.walk("/usr/lib/x86_64-linux-gnu")):
    for name in sorted(names):
        path = os.path.join(directory, name)
        if not os.path.islink(path) and os.path.getsize(path) >= LARGE:
            large.append((path, os.path.getsize(path)))

checksum = 0
maps = []
for path, size in large:
    with open(path, "rb") as file:
        checksum = zlib.crc32(file.read(4096), checksum)
        maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

dice = random.Random(20240101)
weights = [size for _, size in large]
bytes_read = 0
for number in dice.choices(range(len(maps)), weights, k=RANGES):
    start = dice.randrange(0, large[number][1] - RANGE) // mmap.PAGESIZE * mmap.PAGESIZE
    checksum = zlib.crc32(maps[number][start : start + RANGE], checksum)
    bytes_read += RANGE

total = torch.from_numpy(numpy.ones((64, 64), dtype="float32")).matmul(torch.ones(64, 64)).sum().item()
print(
    f"ready checksum={checksum:08x} files={len(large)} bytes={bytes_read} total={total:.0f}",
    "after", round(time.monotonic() - began, 3), "s",
    flush=True,
)
`;
