# `make help` lists what there is.

PYTHON ?= python3

# What the tests that use real programs need, as program=Debian package; | stands between the names of several releases.
TEST_PROGRAMS = dockerd=docker.io docker=docker-cli|docker.io containerd=containerd ctr=containerd skopeo=skopeo \
    docker-registry=docker-registry podman=podman curl=curl gcc=gcc update-ca-certificates=ca-certificates \
    iptables=iptables perf=linux-perf nginx=nginx-light shellcheck=shellcheck busybox=busybox vagrant=vagrant
BENCH_PROGRAMS = nginx=nginx-light docker-registry=docker-registry skopeo=skopeo gcc=gcc taskset=util-linux
# What bench/load.c is compiled with, beside gcc.
HEADERS = [ -e /usr/include/openssl/ssl.h ] || tools/apt-install openssl-headers=libssl-dev

# The oldest versions that setup.cfg allows: no newer than what Ubuntu 24.04 has.
OLDEST = twisted==24.3.0 pyopenssl==23.2.0 cryptography==41.0.7 service-identity==23.1.0 attrs==23.2.0 bcrypt==3.2.2

ROOT := $(filter 0,$(shell id -u))
METADATA = setup.cfg setup.py pyproject.toml
PIP_INSTALL = -m pip --disable-pip-version-check install --quiet
# setuptools' other ways of an editable install hide twisted/plugins from Twisted, which looks along sys.path.
EDITABLE = --config-settings editable_mode=compat --editable

.PHONY: help venv run test lint test-oldest test-conformance test-programs deb test-deb test-vagrant \
    bench bench-programs profile soak clean

help: ## say what can be made
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

venv: .venv/made ## make .venv with the project and the newest of what it needs

run: venv ## run the proxy in the foreground, on port 3128, state in ./var
	exec .venv/bin/twistd --nodaemon --pidfile= dockerproxy $(if $(wildcard .env),--env-file .env)

test: .venv/made-test lint test-programs ## run every test; as root, install the Debian packages they need
ifeq ($(ROOT),0)
	.venv/bin/python -m pytest -ra
else
	@echo "You are not root: tests/e2e is left out, for it starts dockerd and containerd and installs Debian packages."
	.venv/bin/python -m pytest -ra --ignore=tests/e2e
endif

lint: .venv/made-test ## check style and types
	.venv/bin/ruff check
	.venv/bin/mypy

test-oldest: .venv-oldest/made ## run the unit tests on the oldest versions that are supported
	.venv-oldest/bin/python -m pytest -ra --ignore=tests/e2e

test-conformance: .venv/made-test ## run the OCI conformance suite against the hosted registry; SUITE=PATH names its program
	@.venv/bin/python -m tests.conformance.run $(SUITE)

test-programs:
ifeq ($(ROOT),0)
	@tools/apt-install $(foreach pair,$(TEST_PROGRAMS),'$(pair)')
	@dpkg -s vagrant-libvirt >/dev/null 2>&1 || tools/apt-install vagrant-libvirt=vagrant-libvirt
	@$(HEADERS)
endif

deb: ## build dist/docker-registry-proxy_VERSION_all.deb for Debian 13; as root, which makes the tree it is built in
	@rm -rf dist
	@tools/build-deb dist
	@ls dist/*.deb

test-deb: ## build the package and try it out on machines that boot Debian 13; as root
	@rm -rf dist
	@timeout 30m tests/deb/run

test-vagrant: ## bring up the machine of the Vagrantfile, and use it: 15 minutes where there is no KVM; as root
	@rm -rf dist
	@tools/build-deb dist
	@tests/vagrant/shares dist/docker-registry-proxy_*_all.deb
	@tests/vagrant/run

bench: venv bench-programs ## measure beside nginx and docker-registry, 40 minutes; docs/performance.md has the last run
	.venv/bin/python -m bench

profile: venv bench-programs ## sample where the daemon's CPU time goes under the loads of the benchmark; as root, 2 minutes
	@tools/apt-install perf=linux-perf
	.venv/bin/python -m bench.profile

soak: venv bench-programs ## load the daemon for 10 minutes, and see whether memory or descriptors grow; MINUTES=N
	.venv/bin/python -m bench.soak $(if $(MINUTES),--minutes $(MINUTES))

bench-programs:
	@tools/apt-install $(foreach pair,$(BENCH_PROGRAMS),'$(pair)')
	@$(HEADERS)

clean: ## remove what was made; ./var, the cache and the CA, stays
	rm -rf .venv .venv-oldest .cache build dist *.egg-info .hypothesis _trial_temp* tests.* twisted/plugins/dropin.cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/made: $(METADATA)
	@PYTHON=$(PYTHON) tools/make-venv .venv
	.venv/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager $(EDITABLE) .
	@touch $@

.venv/made-test: .venv/made
	.venv/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager $(EDITABLE) '.[test]'
	@touch $@

.venv-oldest/made: $(METADATA) Makefile
	@PYTHON=$(PYTHON) tools/make-venv .venv-oldest
	.venv-oldest/bin/python $(PIP_INSTALL) $(EDITABLE) . pytest hypothesis $(OLDEST)
	@touch $@
