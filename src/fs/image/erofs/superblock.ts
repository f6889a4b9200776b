// EROFS superblock and device slot, as bytes. Used by writer and reader. Layout: fs/erofs/erofs_fs.h of the Linux kernel.

export const SUPERBLOCK_OFFSET = 1024;
const SUPERBLOCK_BYTES = 128;
const DEVICE_SLOT_BYTES = 128;
export const MAGIC = 0xe0f5e1e2;
const BLOCK_BITS = 12;
/** Inodes carry mtimes (EROFS_FEATURE_COMPAT_MTIME). */
const COMPAT_MTIME = 0x2;
const INCOMPAT_CHUNKED_FILE = 0x4;
const INCOMPAT_DEVICE_TABLE = 0x8;
/** EROFS addresses blocks of 4 KiB with 32 bits; the last number means "hole". */
export const NULL_BLOCK = 0xffffffff;
/** Inode numbers count slots of 32 bytes from the start of the metadata. */
export const NID_BYTES = 32;

export interface SuperblockFields {
  /** Must be below 65,536: the field has 16 bits. */
  readonly rootNid: number;
  readonly inodes: number;
  /** Blocks of the metadata device. */
  readonly blocks: number;
  readonly uuid: Uint8Array;
  /** Blocks of the store, when files lie on an extra device; undefined for an image of one device. */
  readonly deviceBlocks: number | undefined;
}

/** Bytes before the first inode: boot area, superblock, and the device slot if there is one; a multiple of 64. */
export function headBytes(hasDevice: boolean): number {
  return SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES + (hasDevice ? DEVICE_SLOT_BYTES : 0);
}

/** The bytes from SUPERBLOCK_OFFSET to headBytes. */
export function encodeSuperblock(fields: SuperblockFields): Uint8Array {
  const hasDevice = fields.deviceBlocks !== undefined;
  const bytes = new Uint8Array(headBytes(hasDevice) - SUPERBLOCK_OFFSET);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, MAGIC, true);
  view.setUint32(8, COMPAT_MTIME, true);
  view.setUint8(12, BLOCK_BITS);
  view.setUint16(14, fields.rootNid, true);
  view.setBigUint64(16, BigInt(fields.inodes), true);
  view.setUint32(36, fields.blocks, true);
  bytes.set(fields.uuid, 48);
  if (fields.deviceBlocks !== undefined) {
    view.setUint32(80, INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE, true);
    view.setUint16(86, 1, true);
    view.setUint16(88, (SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES) / DEVICE_SLOT_BYTES, true);
    // Slot: 64 bytes of tag, then the number of blocks; the other fields stay zero.
    view.setUint32(SUPERBLOCK_BYTES + 64, fields.deviceBlocks, true);
  }
  return bytes;
}
