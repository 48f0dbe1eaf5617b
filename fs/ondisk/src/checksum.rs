//! The two checksums of the format.
//!
//! Source: Documentation/filesystems/ext4/checksums.rst. `metadata_csum` uses
//! CRC-32C with an explicit running value and neither initial nor final
//! inversion (the kernel's `crc32c(seed, data)`); `gdt_csum` uses CRC-16
//! (polynomial 0xA001 reflected, the kernel's `crc16`).

use crc_fast::{CrcAlgorithm, Digest};

/// The kernel's `crc32c(seed, data)`: no inversion at either end. A filesystem's
/// own seed is `crc32c(!0, uuid)` unless `s_checksum_seed` holds it.
pub fn crc32c(seed: u32, data: &[u8]) -> u32 {
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, seed.into());
    digest.update(data);
    // The crate inverts at the end; 32 bits by the algorithm.
    !(digest.finalize() as u32)
}

/// The kernel's `crc16(seed, data)`, for group descriptors under `gdt_csum`.
pub fn crc16(seed: u16, data: &[u8]) -> u16 {
    data.iter().fold(seed, |crc, &byte| {
        (0..8).fold(crc ^ u16::from(byte), |crc, _| {
            if crc & 1 == 1 { (crc >> 1) ^ 0xA001 } else { crc >> 1 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_has_the_standard_check_value_once_inverted() {
        assert_eq!(!crc32c(!0, b"123456789"), 0xE306_9283);
    }

    #[test]
    fn crc32c_continues_where_it_stopped() {
        let whole = crc32c(!0, b"123456789");
        assert_eq!(crc32c(crc32c(!0, b"1234"), b"56789"), whole);
    }

    /// Short and long data are computed in different ways.
    #[test]
    fn crc32c_agrees_with_another_implementation() {
        let data: Vec<u8> = (0..5000u32).map(|n| ((n * n) >> 3) as u8).collect();
        for len in (0..600).chain((600..data.len() - 8).step_by(61)).chain([4084, 4088, 4096]) {
            for start in [0, 1, 8] {
                let (part, seed) = (&data[start..start + len], 0x1234_5678 ^ len as u32);
                assert_eq!(crc32c(seed, part), !crc32c::crc32c_append(!seed, part), "{len}");
            }
        }
    }

    #[test]
    fn crc16_has_the_arc_check_value() {
        assert_eq!(crc16(0, b"123456789"), 0xBB3D);
    }
}
