//! Claims: the binding of a tenant to a slot, from request to release.

mod wire;

pub use wire::*;

use crate::model::{Secret, TenantId, WorkloadId};

/// Carries out claims and releases, and answers what there is.
#[derive(Clone)]
pub struct Tenancy {}

#[allow(unused_variables, clippy::unused_async, missing_docs)]
impl Tenancy {
    pub async fn claim(&self, tenant: TenantId, request: ClaimRequest) -> Result<ClaimAnswer, Error> {
        todo!()
    }
    pub async fn release(&self, tenant: TenantId, request: ReleaseRequest) -> Result<ReleaseAnswer, Error> {
        todo!()
    }
    pub async fn status(&self, tenant: TenantId) -> Result<TenantStatus, Error> {
        todo!()
    }
    pub async fn touch(&self, tenant: TenantId, workload: Option<WorkloadId>) -> Result<(), Error> {
        todo!()
    }
    pub async fn sync(&self, tenant: TenantId, workload: Option<WorkloadId>) -> Result<SyncAnswer, Error> {
        todo!()
    }
    /// `PUT /tenants/{tenant}`: replaces the tenant's metadata.
    pub async fn put_tenant(
        &self,
        tenant: TenantId,
        metadata: serde_json::Map<String, serde_json::Value>,
    ) -> Result<(), Error> {
        todo!()
    }
    pub async fn put_secret(&self, tenant: TenantId, name: &str, secret: Secret) -> Result<(), Error> {
        todo!()
    }
    pub async fn secret_names(&self, tenant: TenantId) -> Result<Vec<String>, Error> {
        todo!()
    }
    pub async fn delete_secret(&self, tenant: TenantId, name: &str) -> Result<(), Error> {
        todo!()
    }
    pub fn workloads(&self) -> Vec<WorkloadStatus> {
        todo!()
    }
    pub fn pools(&self) -> Vec<PoolStatus> {
        todo!()
    }
    pub fn slots(&self) -> Vec<SlotStatus> {
        todo!()
    }
    pub fn readiness(&self) -> Readiness {
        todo!()
    }
}
