#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# dkms.sh install VERSION RELEASE [BUILD-DIRECTORY]
#	Hand the sources to DKMS, which builds and installs them for the kernel
#	RELEASE, and for every kernel that is installed later.
# dkms.sh remove
#	Take back every version that DKMS has, for all kernels.
#
# With $DESTDIR only the sources are put there or removed: whoever unpacks a
# package calls dkms.
set -eu
cd "$(dirname "$0")/.."
destdir=${DESTDIR:-}

remove() {
	if [ -z "$destdir" ] && command -v dkms >/dev/null; then
		for version in $(dkms status kvmaccess | sed -n 's#^kvmaccess/\([^,: ]*\).*#\1#p' | sort -u); do
			dkms remove "kvmaccess/$version" --all
		done
	fi
	rm -rf "$destdir"/usr/src/kvmaccess-*
}

case ${1:-} in
install)
	version=$2 release=$3 build=${4:-}
	sources=$destdir/usr/src/kvmaccess-$version
	if [ -z "$destdir" ] && ! command -v dkms >/dev/null; then
		echo 'dkms-install: there is no dkms here: install the package of this name' >&2
		exit 1
	fi
	remove
	# DKMS would keep a module that "make install" put there, and bring it back.
	rm -f "$destdir/lib/modules/$release/updates/kvmaccess.ko"
	install -D -m 644 kmod/dkms.conf "$sources/dkms.conf"
	find Kbuild kmod -name '*.[chS]' -o -name Kbuild | while read -r file; do
		install -D -m 644 "$file" "$sources/$file"
	done
	[ -z "$destdir" ] || exit 0
	dkms add "kvmaccess/$version"
	dkms install "kvmaccess/$version" -k "$release" ${build:+--kernelsourcedir "$build"}
	;;
remove)
	remove
	;;
*)
	echo 'usage: dkms.sh install VERSION RELEASE [BUILD-DIRECTORY] | remove' >&2
	exit 2
	;;
esac
