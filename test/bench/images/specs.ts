// The benchmark's images: six kinds of container that people run, each as its official or usual image is composed, and
// a tiny one. All of named Debian packages; no filler.
import { COMPILE_COMMAND, DATABASE_ENTRYPOINT, MODEL_SERVER, NGINX_SITE, SERVICE, WEB_ENTRYPOINT } from './programs.ts';
import type { BenchImageSpec, ImageRecipe, ImageVersion, LayerRecipe, Step } from './recipe.ts';

const BOOKWORM = ['bookworm'];
const BOOKWORM_UPDATED = ['bookworm', 'bookworm-updates', 'bookworm-security'];
const TRIXIE = ['trixie'];
const TRIXIE_UPDATED = ['trixie', 'trixie-updates', 'trixie-security'];

const PATH = 'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin';

/** Version 2 keeps the base of version 1 and takes every package above it from where security updates come. */
function sameBase(version: ImageVersion, steps: readonly (readonly Step[])[], config: object): ImageRecipe {
  const suites = version === '1' ? BOOKWORM : BOOKWORM_UPDATED;
  return {
    base: { kind: 'debian', suites: BOOKWORM },
    layers: steps.map((layer): LayerRecipe => ({ suites, steps: layer })),
    config: { ...config },
  };
}

/** Version 2 is the whole image made again from other suites. */
function newBase(suites: readonly string[], steps: readonly (readonly Step[])[], config: object): ImageRecipe {
  return {
    base: { kind: 'debian', suites },
    layers: steps.map((layer): LayerRecipe => ({ suites, steps: layer })),
    config: { ...config },
  };
}

const UPDATED_ABOVE_BASE = 'the same base; every layer above it made again with security updates of bookworm';

const INTERPRETER_COMMAND = ['python3', '/srv/service/service.py'];
const WEB_COMMAND = ['/usr/local/bin/start-site'];
const DATABASE_COMMAND = ['/usr/local/bin/start-database', 'postgres'];
const JVM_COMMAND = ['/usr/share/tomcat10/bin/catalina.sh', 'run'];
const MODEL_COMMAND = ['python3', '/srv/model/server.py'];
const TINY_COMMAND = ['/bin/echo', 'ready'];

export const BENCH_IMAGES: readonly BenchImageSpec[] = [
  {
    name: 'interpreter',
    title: 'Interpreter: a Python service',
    versions: ['1', '2'],
    composition: 'Debian bookworm, Python 3.11 with Django, REST framework, Celery, NumPy, pandas, psycopg2, Pillow',
    update: UPDATED_ABOVE_BASE,
    command: INTERPRETER_COMMAND,
    ready: { kind: 'line', pattern: '^ready ' },
    recipe: (version) =>
      sameBase(
        version,
        [
          [{ install: ['ca-certificates', 'netbase', 'tzdata', 'python3'] }],
          [
            {
              install: [
                'python3-django',
                'python3-djangorestframework',
                'python3-celery',
                'python3-redis',
                'python3-psycopg2',
                'python3-requests',
                'python3-cryptography',
                'python3-yaml',
                'python3-lxml',
                'python3-pil',
                'python3-numpy',
                'python3-pandas',
                'gunicorn',
              ],
            },
          ],
          [{ file: '/srv/service/service.py', content: SERVICE }],
        ],
        { Cmd: INTERPRETER_COMMAND, Env: [PATH, 'PYTHONUNBUFFERED=1'], WorkingDir: '/srv/service' },
      ),
  },
  {
    name: 'web-server',
    title: 'Web server: nginx, PHP-FPM and a wiki',
    versions: ['1', '2'],
    composition: 'Debian bookworm, nginx with modules, PHP 8.2 FPM, MediaWiki 1.39 on SQLite, ImageMagick, librsvg',
    update: UPDATED_ABOVE_BASE,
    command: WEB_COMMAND,
    ready: { kind: 'port', port: 80 },
    recipe: (version) =>
      sameBase(
        version,
        [
          [
            {
              install: [
                'ca-certificates',
                'nginx',
                'libnginx-mod-http-geoip2',
                'libnginx-mod-http-headers-more-filter',
                'libnginx-mod-http-image-filter',
                'libnginx-mod-stream',
                'php8.2-fpm',
                'php8.2-cli',
                'php8.2-apcu',
                'php8.2-curl',
                'php8.2-gd',
                'php8.2-intl',
                'php8.2-mbstring',
                'php8.2-sqlite3',
                'php8.2-xml',
                'php8.2-zip',
                'imagemagick',
                'librsvg2-bin',
              ],
            },
          ],
          [
            { install: ['mediawiki'] },
            {
              run: [
                'mkdir -p /srv/wiki',
                'php /usr/share/mediawiki/maintenance/install.php --dbtype sqlite --dbpath /srv/wiki --dbname wiki \\',
                '  --server http://localhost --scriptpath "" --pass correct-horse-battery Wiki Admin',
                'chown -R www-data:www-data /srv/wiki',
              ].join('\n'),
            },
          ],
          [
            { file: '/etc/nginx/sites-available/default', content: NGINX_SITE },
            { file: '/usr/local/bin/start-site', content: WEB_ENTRYPOINT, mode: 0o755 },
          ],
        ],
        { Entrypoint: WEB_COMMAND, Env: [PATH], ExposedPorts: { '80/tcp': {} }, StopSignal: 'SIGQUIT' },
      ),
  },
  {
    name: 'database',
    title: 'Database: PostgreSQL with PostGIS',
    versions: ['1', '2'],
    composition:
      'Debian bookworm, PostgreSQL 15 with PostGIS 3; the data directory is made at the first start, as official images do',
    update: UPDATED_ABOVE_BASE,
    command: DATABASE_COMMAND,
    ready: { kind: 'line', pattern: 'ready to accept connections' },
    recipe: (version) =>
      sameBase(
        version,
        [
          [
            { install: ['ca-certificates', 'locales', 'tzdata', 'netbase', 'xz-utils', 'zstd'] },
            { run: 'localedef -i en_US -c -f UTF-8 -A /usr/share/locale/locale.alias en_US.UTF-8' },
          ],
          [
            { install: ['postgresql-common'] },
            // The cluster is the container's, not the image's.
            { run: 'echo create_main_cluster = false >> /etc/postgresql-common/createcluster.conf' },
            { install: ['postgresql-15'] },
          ],
          [{ install: ['postgresql-15-postgis-3'] }],
          [{ file: '/usr/local/bin/start-database', content: DATABASE_ENTRYPOINT, mode: 0o755 }],
        ],
        {
          Entrypoint: DATABASE_COMMAND.slice(0, 1),
          Cmd: DATABASE_COMMAND.slice(1),
          Env: [`${PATH}:/usr/lib/postgresql/15/bin`, 'LANG=en_US.UTF-8', 'PGDATA=/var/lib/postgresql/data'],
          ExposedPorts: { '5432/tcp': {} },
          StopSignal: 'SIGINT',
        },
      ),
  },
  {
    name: 'jvm',
    title: 'JVM: Tomcat with its applications',
    versions: ['1', '2'],
    composition: 'Debian bookworm, OpenJDK 17, Tomcat 10 with the manager and example applications',
    update: UPDATED_ABOVE_BASE,
    command: JVM_COMMAND,
    ready: { kind: 'line', pattern: 'Server startup in' },
    recipe: (version) =>
      sameBase(
        version,
        [
          [
            // The package links manuals, which a slim base has no directory for.
            { run: 'mkdir -p /usr/share/man/man1' },
            { install: ['ca-certificates', 'tzdata', 'fontconfig', 'ca-certificates-java', 'openjdk-17-jre-headless'] },
          ],
          [
            { install: ['tomcat10', 'tomcat10-admin', 'tomcat10-examples'] },
            // As Tomcat's own guide to start-up time advises: only tag libraries are searched for tags.
            {
              run: `printf 'tomcat.util.scan.StandardJarScanFilter.jarsTo%s\\n' 'Skip=*.jar' 'Scan=*taglibs*.jar' \\
  >> /etc/tomcat10/catalina.properties`,
            },
          ],
        ],
        {
          Cmd: JVM_COMMAND,
          Env: [
            PATH,
            'JAVA_HOME=/usr/lib/jvm/java-17-openjdk-amd64',
            'CATALINA_HOME=/usr/share/tomcat10',
            'CATALINA_BASE=/var/lib/tomcat10',
          ],
          ExposedPorts: { '8080/tcp': {} },
        },
      ),
  },
  {
    name: 'compiler',
    title: 'Compiler: GCC with build tools',
    versions: ['1', '2'],
    composition: 'Debian bookworm (version 2: trixie), GCC with g++, make, CMake, git, common development libraries',
    update: 'a new base: bookworm with GCC 12 becomes trixie with GCC 14, so nearly every file changes',
    command: COMPILE_COMMAND,
    ready: { kind: 'exit' },
    recipe: (version) =>
      newBase(
        version === '1' ? BOOKWORM : TRIXIE,
        [
          [{ install: ['ca-certificates', 'curl', 'git', 'patch', 'unzip', 'xz-utils', 'python3-minimal'] }],
          [
            {
              install: [
                'gcc',
                'g++',
                'make',
                'cmake',
                'ninja-build',
                'pkg-config',
                'autoconf',
                'automake',
                'libtool',
                'zlib1g-dev',
                'libssl-dev',
                'libcurl4-openssl-dev',
                'libsqlite3-dev',
                'libboost-dev',
              ],
            },
          ],
        ],
        { Cmd: COMPILE_COMMAND, Env: [PATH, 'LANG=C.UTF-8'], WorkingDir: '/tmp' },
      ),
  },
  {
    name: 'model-server',
    title: 'Model server: PyTorch with GPU kernel libraries',
    versions: ['1', '2'],
    composition: 'Debian trixie, PyTorch 2.6, rocBLAS with its GPU kernels (eight files of 117 to 450 MB)',
    update: 'made again from trixie with security updates: new base and packages, the large files as they were',
    command: MODEL_COMMAND,
    ready: { kind: 'line', pattern: '^ready ' },
    recipe: (version) =>
      newBase(
        version === '1' ? TRIXIE : TRIXIE_UPDATED,
        [
          [{ install: ['ca-certificates', 'tzdata', 'python3', 'librocblas0'] }],
          [{ install: ['python3-torch', 'python3-numpy', 'python3-flask', 'gunicorn'] }],
          [{ file: '/srv/model/server.py', content: MODEL_SERVER }],
        ],
        { Cmd: MODEL_COMMAND, Env: [PATH, 'PYTHONUNBUFFERED=1'], WorkingDir: '/srv/model' },
      ),
  },
  {
    name: 'tiny',
    title: 'Tiny: a static busybox',
    versions: ['1', '2'],
    composition: 'a static busybox from Debian',
    update: 'the same base; a changed settings file',
    command: TINY_COMMAND,
    ready: { kind: 'line', pattern: '^ready' },
    recipe: (version) => ({
      base: { kind: 'busybox' },
      layers: [{ suites: [], steps: [{ file: '/etc/settings', content: `version = ${version}\n` }] }],
      config: { Cmd: TINY_COMMAND, Env: [PATH] },
    }),
  },
];
