// SPDX-License-Identifier: MIT

package dump

import (
	"bytes"
	"fmt"
)

// others are files that could be taken for images of physical memory, by how
// they begin.
var others = []struct{ magic, what string }{
	{"KDUMP   ", "a kdump-compressed dump: write it without -z, -l, -s and -R (dump-guest-memory FILE; virsh dump --memory-only --format elf)"},
	{"DISKDUMP", "a diskdump dump: makedumpfile -E writes an ELF file"},
	{"makedumpfile\x00", "a dump in makedumpfile's flat format: makedumpfile -R rearranges it, and -E writes an ELF file"},
	{"AVML", "an image that AVML compressed: avml-convert --source-format lime_compressed --format lime makes it a LiME image"},
	{"LibvirtQemudSave", "a guest that libvirt saved: use virsh dump --memory-only"},
	{"LibvirtQemudPart", "a guest that libvirt saved in part: use virsh dump --memory-only"},
	{"QEVM", "a migration stream, which virsh dump writes without --memory-only: give it that"},
	{"PAGEDU64", "a Windows crash dump, and no Linux guest's: use dump-guest-memory without -w"},
	{"PAGEDUMP", "a Windows crash dump, and no Linux guest's: use dump-guest-memory without -w"},
	{"QFI\xfb", "a disk image (qcow2)"},
	{"KDMV", "a disk image (VMDK)"},
	{"conectix", "a disk image (VHD)"},
	{"vhdxfile", "a disk image (VHDX)"},
	{"hsqs", "a file system (squashfs)"},
	{"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first (unzstd)"},
	{"BZh", "compressed by bzip2: unpack it first (bunzip2)"},
	{"\x04\x22\x4d\x18", "compressed by lz4: unpack it first (unlz4)"},
	{"PK\x03\x04", "a ZIP archive: unpack it first (unzip)"},
	{"!<arch>\n", "an archive (ar)"},
}

// unsupported says what the file is that begins so; nil: unknown.
func unsupported(head []byte) error {
	for _, o := range others {
		if bytes.HasPrefix(head, []byte(o.magic)) {
			return fmt.Errorf("%w: %s", ErrUnsupported, o.what)
		}
	}
	return nil
}
