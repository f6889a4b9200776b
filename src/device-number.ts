// Numbers of devices as stat(2) packs them: gnu_dev_major and gnu_dev_minor in the C library's sys/sysmacros.h.

export function majorOf(device: bigint): number {
  return Number(((device >> 8n) & 0xfffn) | ((device >> 32n) & 0xfffff000n));
}

export function minorOf(device: bigint): number {
  return Number((device & 0xffn) | ((device >> 12n) & 0xffffff00n));
}
