//! POSIX ACLs: the on-disk form and the form Linux programs see.
//!
//! On disk (`ext4_acl_header`, version 1) entries without a name take 4 bytes;
//! `system.posix_acl_*` values (version 2, include/uapi/linux/posix_acl_xattr.h)
//! give every entry 8. Both are little-endian.
//!
//! Invariant: an [`Acl`] satisfies the rules of `posix_acl_valid`: owner, named
//! users, group, named groups, mask, other, in this order; a mask when there
//! is a named entry; permissions of three bits.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Corrupt, Result};

const WHAT: &str = "ACL";
/// `EXT4_ACL_VERSION`.
const DISK_VERSION: u32 = 1;
/// `POSIX_ACL_XATTR_VERSION`.
const XATTR_VERSION: u32 = 2;
/// `ACL_UNDEFINED_ID`: what entries without a name carry.
const UNDEFINED_ID: u32 = u32::MAX;
const HEADER_SIZE: usize = 4;

/// `ext4_acl_entry_short`, and the beginning of every entry.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs)]
struct RawShort {
    e_tag: U16,
    e_perm: U16,
}

/// `ext4_acl_entry` and `struct posix_acl_xattr_entry`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
#[allow(missing_docs)]
struct RawLong {
    e_tag: U16,
    e_perm: U16,
    e_id: U32,
}

const _: () = assert!(size_of::<RawShort>() == 4 && size_of::<RawLong>() == 8);

/// Whom an entry is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AclTag {
    /// The owner.
    UserObj,
    /// A named user.
    User(u32),
    /// The owning group.
    GroupObj,
    /// A named group.
    Group(u32),
    /// The limit of everybody but owner and others.
    Mask,
    /// Everybody else.
    Other,
}

impl AclTag {
    fn from_raw(raw: u16, id: u32) -> Option<Self> {
        Some(match raw {
            0x01 => Self::UserObj,
            0x02 => Self::User(id),
            0x04 => Self::GroupObj,
            0x08 => Self::Group(id),
            0x10 => Self::Mask,
            0x20 => Self::Other,
            _ => return None,
        })
    }

    fn raw(self) -> (u16, u32) {
        match self {
            Self::UserObj => (0x01, UNDEFINED_ID),
            Self::User(id) => (0x02, id),
            Self::GroupObj => (0x04, UNDEFINED_ID),
            Self::Group(id) => (0x08, id),
            Self::Mask => (0x10, UNDEFINED_ID),
            Self::Other => (0x20, UNDEFINED_ID),
        }
    }

    fn is_named(self) -> bool {
        matches!(self, Self::User(_) | Self::Group(_))
    }

    /// Its place in the order of entries.
    fn rank(self) -> u8 {
        match self {
            Self::UserObj => 0,
            Self::User(_) => 1,
            Self::GroupObj => 2,
            Self::Group(_) => 3,
            Self::Mask => 4,
            Self::Other => 5,
        }
    }
}

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AclEntry {
    /// Whom it is about.
    pub tag: AclTag,
    /// Read 4, write 2, execute 1.
    pub perm: u8,
}

/// A valid access or default ACL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acl {
    entries: Vec<AclEntry>,
}

impl Acl {
    /// From entries.
    ///
    /// # Errors
    /// `Value` when they break the rules of the module.
    pub fn new(entries: Vec<AclEntry>) -> Result<Self> {
        for pair in entries.windows(2) {
            let (a, b) = (pair[0].tag, pair[1].tag);
            if a.rank() > b.rank() || (a.rank() == b.rank() && !a.is_named()) {
                return Err(Corrupt::value(WHAT, format!("{b:?} after {a:?}")));
            }
        }
        if let Some(entry) = entries.iter().find(|entry| entry.perm > 7) {
            let detail = format!("{:?} has permissions {:#o}", entry.tag, entry.perm);
            return Err(Corrupt::value(WHAT, detail));
        }
        let has = |tag| entries.iter().any(|entry| entry.tag == tag);
        for tag in [AclTag::UserObj, AclTag::GroupObj, AclTag::Other] {
            if !has(tag) {
                return Err(Corrupt::value(WHAT, format!("{tag:?} is missing")));
            }
        }
        if entries.iter().any(|entry| entry.tag.is_named()) && !has(AclTag::Mask) {
            return Err(Corrupt::value(WHAT, "a named entry without a mask"));
        }
        Ok(Self { entries })
    }

    /// The entries, in order.
    pub fn entries(&self) -> &[AclEntry] {
        &self.entries
    }

    /// The ACL that says just what the low nine bits of a mode say.
    pub fn from_mode(mode: u16) -> Self {
        // Three bits each.
        #[allow(clippy::cast_possible_truncation)]
        let entry = |tag, shift: u16| AclEntry { tag, perm: (mode >> shift & 7) as u8 };
        let entries =
            vec![entry(AclTag::UserObj, 6), entry(AclTag::GroupObj, 3), entry(AclTag::Other, 0)];
        Self { entries }
    }

    /// The nine mode bits an access ACL shows in `i_mode` (the mask stands for
    /// the group), and whether these bits say all of it (`posix_acl_equiv_mode`).
    pub fn mode(&self) -> (u16, bool) {
        let perm = |tag| {
            let found = self.entries.iter().find(|entry| entry.tag == tag);
            found.map(|entry| u16::from(entry.perm))
        };
        let group = perm(AclTag::Mask).or_else(|| perm(AclTag::GroupObj)).unwrap_or(0);
        let owner = perm(AclTag::UserObj).unwrap_or(0);
        let other = perm(AclTag::Other).unwrap_or(0);
        (owner << 6 | group << 3 | other, self.entries.len() == 3)
    }

    /// From the value of an on-disk attribute.
    ///
    /// # Errors
    /// `Value` for another version, a cut entry, or an invalid ACL.
    pub fn from_disk(value: &[u8]) -> Result<Self> {
        let mut rest = check_version(value, DISK_VERSION)?;
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let (short, after) = RawShort::ref_from_prefix(rest)
                .map_err(|_| Corrupt::value(WHAT, "the last entry is cut"))?;
            let (tag, perm) = (short.e_tag.get(), short.e_perm.get());
            let named = matches!(tag, 0x02 | 0x08);
            let (id, after) = if named {
                let (id, after) = U32::ref_from_prefix(after)
                    .map_err(|_| Corrupt::value(WHAT, "the last entry is cut"))?;
                (id.get(), after)
            } else {
                (UNDEFINED_ID, after)
            };
            entries.push(entry(tag, perm, id)?);
            rest = after;
        }
        Self::new(entries)
    }

    /// The value of the on-disk attribute.
    pub fn to_disk(&self) -> Vec<u8> {
        let mut value = DISK_VERSION.to_le_bytes().to_vec();
        for entry in &self.entries {
            let (tag, id) = entry.tag.raw();
            value.extend(tag.to_le_bytes());
            value.extend(u16::from(entry.perm).to_le_bytes());
            if entry.tag.is_named() {
                value.extend(id.to_le_bytes());
            }
        }
        value
    }

    /// From the value a program gives `setxattr`; an empty list is no ACL.
    ///
    /// # Errors
    /// `Value` for another version, a cut entry, or an invalid ACL (`EINVAL`).
    pub fn from_xattr(value: &[u8]) -> Result<Option<Self>> {
        let rest = check_version(value, XATTR_VERSION)?;
        if rest.is_empty() {
            return Ok(None);
        }
        let (raw, cut) = rest.as_chunks::<8>();
        if !cut.is_empty() {
            return Err(Corrupt::value(WHAT, "the last entry is cut"));
        }
        let mut entries = Vec::with_capacity(raw.len());
        for bytes in raw {
            let raw = RawLong::ref_from_bytes(bytes)
                .map_err(|_| Corrupt::truncated(WHAT, bytes.len(), 8))?;
            entries.push(entry(raw.e_tag.get(), raw.e_perm.get(), raw.e_id.get())?);
        }
        Self::new(entries).map(Some)
    }

    /// The value a program gets from `getxattr`.
    pub fn to_xattr(&self) -> Vec<u8> {
        let mut value = XATTR_VERSION.to_le_bytes().to_vec();
        for entry in &self.entries {
            let (tag, id) = entry.tag.raw();
            let raw = RawLong {
                e_tag: U16::new(tag),
                e_perm: U16::new(entry.perm.into()),
                e_id: U32::new(id),
            };
            value.extend(raw.as_bytes());
        }
        value
    }
}

fn check_version(value: &[u8], expected: u32) -> Result<&[u8]> {
    let (version, rest) = U32::ref_from_prefix(value)
        .map_err(|_| Corrupt::truncated(WHAT, value.len(), HEADER_SIZE))?;
    if version.get() != expected {
        return Err(Corrupt::value(WHAT, format!("version is {version}, not {expected}")));
    }
    Ok(rest)
}

fn entry(tag: u16, perm: u16, id: u32) -> Result<AclEntry> {
    let known = AclTag::from_raw(tag, id)
        .ok_or_else(|| Corrupt::value(WHAT, format!("tag is {tag:#x}")))?;
    let perm = u8::try_from(perm)
        .map_err(|_| Corrupt::value(WHAT, format!("permissions are {perm:#o}")))?;
    Ok(AclEntry { tag: known, perm })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn acls() -> impl Strategy<Value = Acl> {
        let ids = || prop::collection::vec((any::<u32>(), 0u8..8), 0..5);
        (0u8..8, ids(), 0u8..8, ids(), 0u8..8, 0u8..8).prop_map(
            |(owner, users, group, groups, mask, other)| {
                let entry = |tag, perm| AclEntry { tag, perm };
                let mut entries = vec![entry(AclTag::UserObj, owner)];
                entries.extend(users.iter().map(|&(id, perm)| entry(AclTag::User(id), perm)));
                entries.push(entry(AclTag::GroupObj, group));
                entries.extend(groups.iter().map(|&(id, perm)| entry(AclTag::Group(id), perm)));
                if !users.is_empty() || !groups.is_empty() {
                    entries.push(entry(AclTag::Mask, mask));
                }
                entries.push(entry(AclTag::Other, other));
                Acl::new(entries).expect("built by the rules")
            },
        )
    }

    proptest! {
        #[test]
        fn both_forms_survive_a_round_trip(acl in acls()) {
            prop_assert_eq!(Acl::from_disk(&acl.to_disk()), Ok(acl.clone()));
            prop_assert_eq!(Acl::from_xattr(&acl.to_xattr()), Ok(Some(acl)));
        }

        #[test]
        fn any_bytes_parse_or_fail(mut bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if bytes.len() >= 4 {
                bytes[..4].copy_from_slice(&[1, 0, 0, 0]);
                let _ = Acl::from_disk(&bytes);
                bytes[0] = 2;
            }
            let _ = Acl::from_xattr(&bytes);
        }
    }

    #[test]
    fn what_breaks_the_rules_is_refused() {
        let entry = |tag, perm| AclEntry { tag, perm };
        let plain = Acl::from_mode(0o640);
        assert_eq!(plain.mode(), (0o640, true));
        let mut unordered = plain.entries().to_vec();
        unordered.swap(0, 1);
        assert!(Acl::new(unordered).is_err());
        let mut unmasked = plain.entries().to_vec();
        unmasked.insert(1, entry(AclTag::User(5), 7));
        assert!(Acl::new(unmasked.clone()).is_err());
        unmasked.insert(3, entry(AclTag::Mask, 6));
        assert_eq!(Acl::new(unmasked).unwrap().mode(), (0o660, false));
        assert!(Acl::new(plain.entries()[..2].to_vec()).is_err());
        assert!(Acl::from_disk(&plain.to_xattr()).is_err(), "the versions differ");
        assert_eq!(Acl::from_xattr(&[2, 0, 0, 0]), Ok(None));
    }
}
